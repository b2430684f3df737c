"""Import before torch: lets OpenMP's idle threads sleep; on a busy machine, spinning made a step 2.5 times as long."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
