# SPDX-License-Identifier: Apache-2.0
"""`python -m pydense.cli`, the same as the `pydense` command."""

import sys

from pydense.cli import main

if __name__ == "__main__":
    sys.exit(main())
