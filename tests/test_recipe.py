"""Recipes: every mistake with its line, overrides, digests, the way to YAML and back, and the recipes that ship."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from compress.errors import UserError
from compress.methods import gptq
from compress.recipe import Calibration, Eval, Head, Recipe, Step, list_shipped, load, shipped_folder
from compress.recipe_check import list_words

GOOD = """\
# a comment
model: folder
steps:
  - method: gptq
    bits: 3
    group_size: 32
    include: ["*.mlp.*"]
calibration:
  samples: 4
eval: null
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def lines_of(folder: Path, text: str, *overrides: str) -> list[str]:
    """The error's lines, without the folder."""
    with pytest.raises(UserError) as caught:
        load(write(folder, text), overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_a_head_is_read_and_decides_the_digest_only_where_there_is_one(tmp_path: Path) -> None:
    plain = load(write(tmp_path, GOOD))
    assert plain.head is None and plain.to_dict()["head"] is None
    recipe = load(write(tmp_path, GOOD), ["head.bits=4", "head.group_size=-1"])
    assert recipe.head == Head(bits=4, group_size=-1, symmetric=False, layers="both")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.digest() != plain.digest() == load(write(tmp_path, GOOD + "head: null\n")).digest()
    assert load(write(tmp_path, GOOD), ["head.symmetric=true"]).head == Head(symmetric=True)
    for setting, said in (
        ("head.bits=5", "head.bits: got 5, wanted 2, 3, 4 or 8"),
        ("head.group_size=0", "head.group_size: got 0, wanted a positive number of features, or -1 for a whole row"),
        ("head.layers=all", "head.layers: got the text 'all', wanted 'both', 'head' or 'embedding'"),
        ("head.sample=1", "head.sample: unknown key; did you mean 'samples', which belongs in calibration?"),
        ("layers=head", "layers: 'layers' has no meaning at the top level; it belongs in head"),
    ):
        assert lines_of(tmp_path, GOOD, setting) == [f"--set {setting}: {said}"]


def test_loads_values_and_defaults(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD))
    assert recipe.name == "mine"
    assert recipe.model == "folder"
    assert recipe.steps[0].include == ("*.mlp.*",)
    assert recipe.steps[0].config == gptq.Config(bits=3, group_size=32)
    assert recipe.calibration == Calibration(samples=4)
    assert recipe.eval is None
    assert recipe.format == "compressed-tensors"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("    bits: 3", "    bitz: 3", "mine.yaml:5: steps.0.bitz: unknown key; did you mean 'bits'?"),
        ("    bits: 3", "    bits: 5", "mine.yaml:5: steps.0.bits: got 5, wanted 2, 3, 4 or 8"),
        ("    bits: 3", "    bits: '4'", "mine.yaml:5: steps.0.bits: got the text '4', wanted 2, 3, 4 or 8"),
        ("    group_size: 32", "    group_size: 3.5", "mine.yaml:6: steps.0.group_size: got 3.5, wanted an integer"),
        ("    group_size: 32", "    group_size: true", "mine.yaml:6: steps.0.group_size: got True, wanted an integer"),
        (
            "    group_size: 32",
            "    group_size: 0",
            "mine.yaml:6: steps.0.group_size: got 0, wanted a positive number of inputs, or -1 for a whole row",
        ),
        (
            '    include: ["*.mlp.*"]',
            "    include: []",
            "mine.yaml:7: steps.0.include: got the list [], wanted at least 1 item",
        ),
        ("  samples: 4", "  sampels: 4", "mine.yaml:9: calibration.sampels: unknown key; did you mean 'samples'?"),
        ("  samples: 4", "  samples: 0", "mine.yaml:9: calibration.samples: got 0, wanted greater than or equal to 1"),
        ("eval: null", "evall: null", "mine.yaml:10: evall: unknown key; did you mean 'eval'?"),
        ("eval: null", "eval: 7", "mine.yaml:10: eval: got 7, wanted a mapping of keys to values"),
        ("eval: null", "seed: -1", "mine.yaml:10: seed: got -1, wanted greater than or equal to 0"),
        (
            "eval: null",
            "dtype: fp16",
            "mine.yaml:10: dtype: got the text 'fp16', wanted 'auto', 'bfloat16', 'float16' or 'float32'",
        ),
    ],
)
def test_each_mistake_names_its_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert lines_of(tmp_path, GOOD.replace(old, new)) == [expected]


def test_a_misplaced_key_says_where_it_belongs(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, "bits: 4\n" + GOOD)
    where = "it belongs in a step with method gptq or rtn (steps.0.bits)"
    assert line == f"mine.yaml:1: bits: 'bits' has no meaning at the top level; {where}"
    (line,) = lines_of(tmp_path, GOOD.replace("    bits: 3", "    samples: 3"))
    assert line == "mine.yaml:5: steps.0.samples: 'samples' has no meaning in steps.0; it belongs in calibration"
    (line,) = lines_of(tmp_path, GOOD.replace("gptq", "rtn").replace("    bits: 3", "    damping: 3"))
    assert line.startswith(
        "mine.yaml:5: steps.0.damping: 'damping' has no meaning in steps.0; it belongs in a step with"
    )
    assert "gptq" in line


def test_a_key_near_one_that_belongs_elsewhere(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, "groupsize: 4\n" + GOOD)
    assert line.startswith("mine.yaml:1: groupsize: unknown key; did you mean 'group_size', which belongs in a step")
    (line,) = lines_of(tmp_path, "zzzzzz: 4\n" + GOOD)
    assert line.startswith("mine.yaml:1: zzzzzz: unknown key; known at the top level: name, model, steps")


def test_unknown_method_lists_the_files_and_the_nearest(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, GOOD.replace("gptq", "gtpq"))
    assert line.startswith("mine.yaml:4: steps.0.method: got 'gtpq', but there is no compress/methods/gtpq.py")
    assert "did you mean 'gptq'?" in line
    folder = Path(gptq.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if path.stem != "base" and not path.stem.startswith("_")}
    assert set(list_words("methods")) == files
    assert all(word in line for word in files)


def test_missing_and_misspelt_method(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, GOOD.replace("- method: gptq", "- metod: gptq"))
    assert line.startswith("mine.yaml:4: steps.0.method: is missing")
    (line,) = lines_of(tmp_path, "eval: null\n")
    assert line == "mine.yaml:1: steps is missing"
    (line,) = lines_of(tmp_path, "seed: 1\nsteps: []\n")
    assert line == "mine.yaml:2: steps: got the list [], wanted at least 1 item"
    (line,) = lines_of(tmp_path, "steps:\n  - method: rtn\n  - gptq\n")
    assert line == "mine.yaml:3: steps.1: got the text 'gptq', wanted a mapping such as '- method: gptq'"


def test_unknown_format(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, GOOD + "format: natve\n")
    assert line.startswith("mine.yaml:11: format: got 'natve', but there is no compress/storage/formats/natve.py")
    assert "did you mean 'native'?" in line
    same = [load(write(tmp_path, GOOD + f"format: {word}\n")) for word in ("compressed-tensors", "compressed_tensors")]
    assert same[0].digest() == same[1].digest()


def test_all_mistakes_come_together_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "steps:\n  - method: rtn\n    bits: 7\n    bit: 3\ncalibration:\n  tokens: x\nfromat: gptq\n"
    found = lines_of(tmp_path, text, "steps.0.group_size=0.5")
    assert [line.split(": ")[0] for line in found] == [
        "mine.yaml:3", "mine.yaml:4", "mine.yaml:6", "mine.yaml:7", "--set steps.0.group_size=0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("steps: [\n", "mine.yaml:2: not valid YAML"),
        ("steps:\n  - method: rtn\n   bits: 4\n", "mine.yaml:3: not valid YAML"),
        (
            "steps:\n  - method: rtn\n    bits: 4\n    bits: 3\n",
            "mine.yaml:4: steps.0.bits stands here for the second time",
        ),
        ("1: 2\n", "mine.yaml:1: got 1 for a key"),
        ("steps: &a [*a]\n", "mine.yaml:1: steps.0 holds itself"),
        ("- method: rtn\n", "mine.yaml: a recipe is a mapping"),
        ("", "mine.yaml: a recipe is a mapping"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, place: str) -> None:
    assert lines_of(tmp_path, text)[0].startswith(place)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="can't be read as a recipe"):
        load(tmp_path / "mine.yaml")


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD.replace("    bits: 3", "    damping: 1e-3")))
    assert recipe.steps[0].config == gptq.Config(damping=1e-3, group_size=32)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    changed = load(
        path,
        ["steps.0.bits=2", "calibration.corpus=some text.txt", "eval.windows=3", "steps.0.include=*attn*", "seed=5",
         "steps.0.exclude=[a, b]", "output=null"],
    )  # fmt: skip
    step = changed.steps[0]
    assert (step.config, step.include, step.exclude) == (gptq.Config(bits=2, group_size=32), ("*attn*",), ("a", "b"))
    assert changed.calibration == Calibration(samples=4, corpus="some text.txt")
    assert changed.eval == Eval(windows=3)
    assert changed.seed == 5
    assert load(path, ["eval.windows=3", "eval=null"]).eval is None
    assert load(path).steps[0].config == gptq.Config(bits=3, group_size=32)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("steps.0.bitz=3", "steps.0.bitz: unknown key; did you mean 'bits'?"),
        ("steps.0.bits=abc", "steps.0.bits: got the text 'abc', wanted 2, 3, 4 or 8"),
        (
            "bits=3",
            "bits: 'bits' has no meaning at the top level; it belongs in a step with method gptq or rtn (steps.0.bits)",
        ),
        ("steps.1.bits=3", "steps has 1 entries, counted from 0; there is no steps.1"),
        ("steps.bits=3", "steps is a list: give a number, such as steps.0, in place of 'bits'"),
        ("steps.0.bits.x=3", "steps.0.bits is 3, which has nothing inside to set"),
        ("steps.0.bits", "wanted KEY=VALUE, for example steps.0.bits=3 or calibration.corpus=notes.txt"),
        ("=3", "wanted KEY=VALUE, for example steps.0.bits=3 or calibration.corpus=notes.txt"),
        ("calibration.sampels=3", "calibration.sampels: unknown key; did you mean 'samples'?"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, setting: str, said: str) -> None:
    assert lines_of(tmp_path, GOOD, setting) == [f"--set {setting}: {said}"]


def test_python_and_yaml_say_the_same(tmp_path: Path) -> None:
    data: dict[str, Any] = YAML(typ="safe").load(GOOD)
    step = Step(method="gptq", bits=3, group_size=32, include="*.mlp.*")
    written = Recipe(model="folder", steps=[step], calibration=Calibration(samples=4), eval=None)
    assert Recipe.from_dict(data) == written
    assert Recipe(**data) == written
    assert load(write(tmp_path, GOOD)).digest() == written.digest()
    config = gptq.Config(bits=3, group_size=32)
    assert Step(method="gptq", config=config, include=["*.mlp.*"]) == step


def test_mistakes_in_python() -> None:
    with pytest.raises(UserError, match=r"Step: bitz: unknown key; did you mean 'bits'"):
        Step(method="gptq", bitz=3)
    with pytest.raises(UserError, match=r"Step: config: got Config\(.*wanted a Config of compress.methods.rtn"):
        Step(method="rtn", config=gptq.Config())
    with pytest.raises(UserError, match="config is given, so bits must be set in it"):
        Step(method="gptq", config=gptq.Config(), bits=3)
    with pytest.raises(UserError, match=r"Calibration: sample: unknown key; did you mean 'samples'"):
        Calibration(sample=3)
    with pytest.raises(UserError, match=r"Recipe: stesp: unknown key; did you mean 'steps'"):
        Recipe(steps=[Step(method="rtn")], stesp=3)
    with pytest.raises(ValueError, match="frozen"):
        Recipe(steps=[Step(method="rtn")]).seed = 3  # type: ignore[misc]
    assert issubclass(UserError, ValueError)


def test_digest_is_stable_and_sensitive() -> None:
    base = Recipe(steps=[Step(method="rtn")])
    spelled_out = Recipe.from_dict(base.to_dict())
    assert base.digest() == spelled_out.digest()
    assert re.fullmatch("[0-9a-f]{64}", base.digest())
    others = [
        Recipe(steps=[Step(method="rtn", bits=3)]),
        Recipe(steps=[Step(method="gptq")]),
        Recipe(steps=[Step(method="rtn", exclude=["*down*"])]),
        Recipe(steps=[Step(method="rtn", include=["a"]), Step(method="rtn", include=["b"])]),
        Recipe(steps=[Step(method="rtn")], calibration=Calibration(seed=1)),
        Recipe(steps=[Step(method="rtn")], format="dense"),
        Recipe(steps=[Step(method="rtn")], dtype="float32"),
        Recipe(steps=[Step(method="rtn")], seed=1),
    ]
    assert len({base.digest(), *(one.digest() for one in others)}) == 1 + len(others)
    for same in ({"name": "x"}, {"model": "m"}, {"output": "o"}, {"eval": None}):
        assert Recipe(steps=[Step(method="rtn")], **same).digest() == base.digest()


@pytest.mark.parametrize("name", list_shipped())
def test_shipped_recipes_load_and_come_back_from_yaml(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    assert recipe == Recipe.load(f"{name}.yaml")
    assert recipe == Recipe.load(str(shipped_folder() / f"{name}.yaml"))
    assert recipe.name == name
    assert load(write(tmp_path, recipe.to_yaml())) == recipe


def test_the_shipped_recipes_are_what_they_are_called() -> None:
    assert {"rtn8", "rtn4", "gptq4", "gptq3", "gptq2"} <= set(list_shipped())
    assert [step.method for step in Recipe.load("llm_int8").steps] == ["llm_int8"]
    smooth, rounded = Recipe.load("w8a8").steps
    assert smooth.method == "smoothquant"
    assert {"bits": 8, "activation_bits": 8}.items() <= rounded.config.model_dump().items()
    for name in set(list_shipped()) - {"llm_int8", "w8a8"}:
        method, bits = re.fullmatch(r"([a-z_]+)(\d)", name).groups()  # type: ignore[union-attr]
        (step,) = Recipe.load(name).steps
        assert (step.method, step.config.model_dump()["bits"]) == (method, int(bits))


@pytest.mark.parametrize("name", list_shipped())
def test_every_key_of_a_shipped_recipe_has_a_comment(name: str) -> None:
    lines = (shipped_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    keys = 0
    for number, line in enumerate(lines):
        if re.match(r"^\s*(- )?\w+:", line):
            keys += 1
            indent = len(line) - len(line.lstrip())
            before = lines[number - 1]
            assert before.lstrip().startswith("# "), f"{name}.yaml:{number + 1}: {line.strip()} is not explained above"
            assert len(before) - len(before.lstrip()) == indent, (
                f"{name}.yaml:{number + 1}: comment is not beside the key"
            )
    assert keys >= 10


def test_an_unknown_recipe_lists_those_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        Recipe.load("gqtp4.yaml")
    assert "did you mean 'gptq4'?" in str(caught.value)
    assert all(name in str(caught.value) for name in list_shipped())
    (tmp_path / "gptq4.yaml").write_text("steps:\n  - method: rtn\n")
    assert Recipe.load("gptq4.yaml").steps[0].method == "rtn"  # a file that is there goes first
    assert Recipe.load("gptq4").steps[0].method == "gptq"
