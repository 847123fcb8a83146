"""How a wheel is built; what the package is stands in pyproject.toml.

From Python 3.11 on, the C extensions of a wheel are built against the limited API, so that one wheel fits every later
Python too. (3.10 has a wheel of its own: its limited API has no buffers.) An editable install has the extension of
its own Python.

Where nothing could be compiled, the build says so and goes on: the wheel is a plain one for every machine, and the
library says so where it is used.
"""

import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

FIRST_PYTHON = (3, 11)
IS_LIMITED = (
    sys.implementation.name == "cpython"
    and sys.version_info >= FIRST_PYTHON
    and not sysconfig.get_config_var("Py_GIL_DISABLED")  # such a Python has no limited API
)
NOT_COMPILED = """
sense-v2: the C extensions couldn't be compiled; the errors are above. It is installed without them. All of it works,
and gives the same bytes, but rows are read and hashed several times slower. To have them, install a C compiler and
Python's headers, then sense-v2 again with --force-reinstall.
"""


class BuildWheel(bdist_wheel):
    def run(self) -> None:
        if IS_LIMITED:
            version = "0x{:02X}{:02X}0000".format(*FIRST_PYTHON)
            for extension in self.distribution.ext_modules:
                extension.py_limited_api = True
                extension.define_macros.append(("Py_LIMITED_API", version))
        if sys.platform == "linux":
            for extension in self.distribution.ext_modules:
                # auditwheel tells a wheel's libc by what its first extension is linked with, and gives up where that
                # calls nothing of it, as _ngrams.
                extension.extra_link_args.append("-Wl,--no-as-needed")
        build = self.get_finalized_command("build_ext")
        self.run_command("build_ext")
        if any(Path(file).exists() for file in build.get_outputs()):
            self.py_limited_api = "cp{}{}".format(*FIRST_PYTHON) if IS_LIMITED else False
        else:
            print(NOT_COMPILED, file=sys.stderr)
            self.distribution.ext_modules = None
            self.root_is_pure = True
        super().run()


setup(cmdclass={"bdist_wheel": BuildWheel})
