"""A bundle's variant -> Session. One interface over the runtimes that can execute it.

Runtimes are imported when a session is opened, so a machine needs only the one it uses.
"""

from ffl_deploy.runtime.onnx_runtime import OnnxRuntimeSession, import_onnxruntime
from ffl_deploy.runtime.registry import (
    RUNTIMES,
    computes_on_cpu,
    open_session,
    require_gpu_runtime,
    runtime_named,
)
from ffl_deploy.runtime.session import Outputs, Session

__all__ = [
    "RUNTIMES",
    "OnnxRuntimeSession",
    "Outputs",
    "Session",
    "computes_on_cpu",
    "import_onnxruntime",
    "open_session",
    "require_gpu_runtime",
    "runtime_named",
]
