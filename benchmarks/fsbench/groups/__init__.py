"""All groups of jobs, in the order in which they are run."""

from .apt import Apt
from .data import Data
from .group import Group
from .listings import Find, Ls
from .lookups import Shapes, Stat
from .lowers import Append, Lowers
from .memory import Memory
from .pip import Pip
from .programs import Build, Git, Python
from .small_files import Read, Xattr
from .writing import Create

GROUPS: tuple[Group, ...] = (
    Stat(), Find(), Read(), Xattr(), Create(), Lowers(), Ls(), Append(), Data(), Shapes(), Memory(), Python(),
    Git(), Build(), Pip(), Apt(),
)  # fmt: skip

__all__ = ["GROUPS", "Group"]
