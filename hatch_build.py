"""Compiles the CPU kernels when the package is built or installed; without a compiler, says so."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CpuKernels(BuildHookInterface):
    """Adds the compiled library to the wheel, which then belongs to one platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See hatchling's documentation of build hooks."""
        del version
        if self.target_name != "wheel":
            return
        built = runpy.run_path(str(Path(self.root) / "kernels_cpu" / "build.py"))
        try:
            built["build"]()
        except (built["NoCompiler"], RuntimeError) as error:
            self.app.display_warning(
                f"CPU kernels were not built, packed models will run on XLA alone: {error}"
            )
            return
        build_data["artifacts"].append("kernels_cpu/*.so")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
