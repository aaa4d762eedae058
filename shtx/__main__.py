import sys

from shtx.cli import main

sys.exit(main())
