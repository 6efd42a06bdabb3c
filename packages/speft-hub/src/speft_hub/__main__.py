"""`python -m speft_hub`."""

from .cli import main

main()
