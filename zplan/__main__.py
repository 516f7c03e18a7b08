"""`python -m zplan`, the same as `zplan`."""

from zplan.cli import main

main()
