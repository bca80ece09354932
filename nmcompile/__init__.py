"""N:M fine-grained sparsity for PyTorch: every conv and linear node as three explicit, pruned GEMMs."""

from nmcompile import onnxruntime as onnxruntime
from nmcompile.api.analyze import analyze as analyze
from nmcompile.api.bench import bench as bench
from nmcompile.api.bisect import bisect as bisect
from nmcompile.api.calibrate import calibrate as calibrate
from nmcompile.api.choose_patterns import choose_patterns as choose_patterns
from nmcompile.api.compare import compare as compare
from nmcompile.api.compile import compile as compile
from nmcompile.api.decoder import decoder as decoder
from nmcompile.api.decompile import decompile as decompile
from nmcompile.api.decompile import is_compiled as is_compiled
from nmcompile.api.export import ExportReport as ExportReport
from nmcompile.api.export import export as export
from nmcompile.api.fatrelu import fatrelu as fatrelu
from nmcompile.api.finalize import finalize as finalize
from nmcompile.api.freeze import freeze as freeze
from nmcompile.api.inspect import inspect as inspect
from nmcompile.api.runtime import runtime as runtime
from nmcompile.api.sparse_state import load_sparse_state_dict as load_sparse_state_dict
from nmcompile.api.sparse_state import sparse_state_dict as sparse_state_dict
from nmcompile.api.verify import verify as verify
from nmcompile.backends.shared.saved_choices import load_choices as load_choices
from nmcompile.backends.shared.saved_choices import save_choices as save_choices
from nmcompile.config import CompileConfig as CompileConfig
from nmcompile.config import Phase as Phase
from nmcompile.config import presets as presets
from nmcompile.errors import NMCompileError as NMCompileError
from nmcompile.layer_config import LayerConfig as LayerConfig
from nmcompile.layer_config import Pruning as Pruning
from nmcompile.pruning.pattern import NMPattern as NMPattern
from nmcompile.runtime.runtime import Runtime as Runtime
from nmcompile.three_gemm.modules import ThreeGemm as ThreeGemm

__version__ = "0.1.0"
