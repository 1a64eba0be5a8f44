"""One file, one method, one word of a recipe: `method: gptq` is `compress/methods/gptq.py`."""
