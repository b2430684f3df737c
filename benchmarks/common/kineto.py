"""Import before torch: keeps its profiler from logging that it starts and stops."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
