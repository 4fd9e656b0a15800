import sys

from vqad.cli import main

sys.exit(main())
