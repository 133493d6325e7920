"""`python -m oxmerge`: the command line."""

from oxmerge.cli import main

raise SystemExit(main())
