"""`python -m kvrun`"""

import sys

from kvrun.cli import main

sys.exit(main())
