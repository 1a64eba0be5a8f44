// run_parallel: PyTorch's own pool of OpenMP threads where its runtime was handed in, else threads of our own.
//
// Two pools on few cores get in each other's way: each spins while it waits for the other to leave the processor. So
// nothing here links OpenMP; the address of PyTorch's GOMP_parallel comes from Python, and both share what it keeps.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <unistd.h>
#endif

#include "kernels.h"

namespace compress {
namespace {

using Body = void (*)(void* context, int thread, int threads);

thread_local bool inside = false;  // this thread is in a body: what it starts runs on it alone

struct Job {
  Body body;
  void* context;
};

void run_part(const Job& job, int thread, int threads) {
  inside = true;
  job.body(job.context, thread, threads);
  inside = false;
}

// -- OpenMP -----------------------------------------------------------------------------------------------------------

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using Number = int (*)();

std::atomic<Parallel> openmp_parallel{nullptr};
std::atomic<Number> openmp_number{nullptr}, openmp_total{nullptr};

void openmp_body(void* job) {
  run_part(*static_cast<Job*>(job), openmp_number.load(std::memory_order_relaxed)(),
           openmp_total.load(std::memory_order_relaxed)());
}

// -- threads of our own -----------------------------------------------------------------------------------------------

int process() {
#ifdef _WIN32
  return 0;
#else
  return static_cast<int>(getpid());
#endif
}

// Workers wait for the next job by looking for a few microseconds, then by sleeping. One job at a time: whoever comes
// while another thread's runs does its own alone. Never destroyed: workers may outlive the destruction of statics.
class Pool {
 public:
  explicit Pool(int id) : id_(id) {}
  int id() const { return id_; }

  // False if the pool is busy or its threads can't be started; nothing was run then.
  bool run(const Job& job, int threads) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock() || !grow(threads - 1)) return false;
    left_.store(threads - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      job_ = job;
      threads_ = threads;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    run_part(job, 0, threads);
    while (left_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
    return true;
  }

 private:
  bool grow(int workers) {
    try {
      while (static_cast<int>(workers_.size()) < workers) {
        const int number = static_cast<int>(workers_.size()) + 1;
        const uint64_t seen = round_.load(std::memory_order_relaxed);
        workers_.emplace_back([this, number, seen] { work(number, seen); });
        workers_.back().detach();
      }
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }

  void work(int number, uint64_t seen) {
    for (;;) {
      seen = wait(seen);
      // A worker beyond the job's threads isn't waited for, so a newer job may be on its way: it looks only at its own.
      std::unique_lock<std::mutex> lock(sleep_);
      if (round_.load(std::memory_order_relaxed) != seen) continue;
      const Job job = job_;
      const int threads = threads_;
      lock.unlock();
      if (number >= threads) continue;
      run_part(job, number, threads);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint64_t wait(uint64_t seen) {
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < 64; ++i) {
        const uint64_t round = round_.load(std::memory_order_acquire);
        if (round != seen) return round;
      }
      std::this_thread::yield();
    } while (std::chrono::steady_clock::now() - start < std::chrono::microseconds(50));
    std::unique_lock<std::mutex> lock(sleep_);
    wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
    return round_.load(std::memory_order_relaxed);
  }

  const int id_;
  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int> left_{0};
  Job job_{};
  int threads_ = 0;
  std::vector<std::thread> workers_;
};

// Threads do not survive a fork: the child gets a pool of its own.
Pool& own_pool() {
  static std::atomic<Pool*> current{nullptr};
  static std::mutex making;
  Pool* pool = current.load(std::memory_order_acquire);
  if (!pool || pool->id() != process()) {
    std::lock_guard<std::mutex> lock(making);
    pool = current.load(std::memory_order_acquire);
    if (!pool || pool->id() != process()) {
      pool = new Pool(process());
      current.store(pool, std::memory_order_release);
    }
  }
  return *pool;
}

}  // namespace

void use_openmp(void* parallel, void* thread_number, void* thread_total) {
  openmp_number.store(reinterpret_cast<Number>(thread_number));
  openmp_total.store(reinterpret_cast<Number>(thread_total));
  openmp_parallel.store(thread_number && thread_total ? reinterpret_cast<Parallel>(parallel) : nullptr);
}

void run_parallel(int threads, void (*body)(void* context, int thread, int threads), void* context) {
  Job job{body, context};
  if (threads <= 1 || inside) {
    const bool before = inside;
    run_part(job, 0, 1);
    inside = before;
  } else if (const Parallel parallel = openmp_parallel.load(std::memory_order_acquire)) {
    parallel(openmp_body, &job, static_cast<unsigned>(threads), 0);
  } else if (!own_pool().run(job, threads)) {
    run_part(job, 0, 1);
  }
}

}  // namespace compress
