"""From a method's name to its class. Third parties add theirs through the entry-point group `kvfold.methods`."""

from importlib.metadata import entry_points

from kvfold.errors import UserError, unknown_name
from kvfold.methods.base import Method
from kvfold.methods.dmc import DMC
from kvfold.methods.dms import DMS
from kvfold.methods.fold import Fold
from kvfold.methods.scored import H2O, TOVA
from kvfold.methods.window import Full, Window

METHODS: dict[str, type[Method]] = {method.name: method for method in (Full, Window, H2O, TOVA, DMC, DMS, Fold)}

ENTRY_POINT_GROUP = "kvfold.methods"


def method_class(name: str) -> type[Method]:
    """The class of a method; installed packages are asked only for a name that kvfold itself doesn't know."""
    if name not in METHODS:
        installed = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
        if name not in installed:
            raise unknown_name("time method", name, {*installed, *METHODS})
        METHODS[name] = installed[name].load()
    return METHODS[name]


def parse_time(text: str) -> Method:
    """The method of one text form, such as `full`, `window:64+4`, `h2o:25%+25%`, `dmc:inf`."""
    name, colon, args = (part.strip() for part in text.partition(":"))
    found = method_class(name)
    if colon and not args:
        raise UserError(f"'{text.strip()}': nothing follows the colon: write '{name}' or give its settings")
    try:
        return found.parse(args)
    except UserError:
        raise
    except ValueError as error:  # of a third party, whose users write the text all the same
        raise UserError(str(error)) from error
