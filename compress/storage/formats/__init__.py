"""One file per on-disk format; a recipe's ``format`` is the file's name. See ``base`` for what each file offers."""
