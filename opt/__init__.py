"""What opt_train_demo.py and opt_benchmark.py build with: one module a concern."""

import logging
import warnings

# [F3] What ColossalAI's imports say on every process about packages that nothing here uses (apex,
# tensornvme, bitsandbytes).
warnings.filterwarnings("ignore", message=".*(apex|tensornvme|TypedStorage)")
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
# The plan says it, see limits.unused_gpus
warnings.filterwarnings("ignore", message="CUDA initialization")
