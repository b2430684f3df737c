"""Import before torch: OpenMP's idle threads sleep. Spinning made a step 2.5 times as long."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
