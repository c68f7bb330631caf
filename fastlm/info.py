"""`python -m fastlm.info` prints what `fastlm.info()` returns.

Importing this module puts it where the function of the same name was in the package, so it can be called like it.
"""

import sys
import types

from fastlm._info import info
from fastlm._report import Report


class _CallableModule(types.ModuleType):
    def __call__(self) -> Report:
        return info()


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    print(info())
