"""N:M fine-grained sparsity for PyTorch: every conv and linear node as three explicit, pruned GEMMs."""

from nmcompile.api import analyze as analyze
from nmcompile.api import compile as compile
from nmcompile.api import decompile as decompile
from nmcompile.api import inspect as inspect
from nmcompile.api import is_compiled as is_compiled
from nmcompile.calibration import calibrate as calibrate
from nmcompile.comparison import compare as compare
from nmcompile.config import CompileConfig as CompileConfig
from nmcompile.config import LayerConfig as LayerConfig
from nmcompile.config import Phase as Phase
from nmcompile.config import Pruning as Pruning
from nmcompile.config import presets as presets
from nmcompile.errors import NMCompileError as NMCompileError
from nmcompile.exporting import ExportReport as ExportReport
from nmcompile.exporting import export as export
from nmcompile.finalization import finalize as finalize
from nmcompile.freezing import freeze as freeze
from nmcompile.ir.modules import ThreeGemm as ThreeGemm
from nmcompile.pruning import NMPattern as NMPattern
from nmcompile.sparse_state import load_sparse_state_dict as load_sparse_state_dict
from nmcompile.sparse_state import sparse_state_dict as sparse_state_dict
from nmcompile.verification import verify as verify

__version__ = "0.1.0"
