import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")           # test workers share the machine's cores; before PyTorch is loaded
sys.path.insert(0, str(Path(__file__).parent.parent))   # `pytest` alone does not put the repository on the path
