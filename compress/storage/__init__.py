"""The only room that touches weight files: lazy reader, atomic writer, one file per on-disk format."""
