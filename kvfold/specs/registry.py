"""From a method's name to its spec. Third parties add theirs through the entry-point group `kvfold.specs`."""

from importlib.metadata import entry_points

from kvfold.specs.base import TimeSpec
from kvfold.specs.dmc import DMCSpec
from kvfold.specs.dms import DMSSpec
from kvfold.specs.full import FullSpec
from kvfold.specs.h2o import H2OSpec
from kvfold.specs.names import unknown_name
from kvfold.specs.tova import TOVASpec
from kvfold.specs.window import WindowSpec

TIME_SPECS: dict[str, type[TimeSpec]] = {
    spec.name: spec for spec in (FullSpec, WindowSpec, H2OSpec, TOVASpec, DMCSpec, DMSSpec)
}

ENTRY_POINT_GROUP = "kvfold.specs"


def time_spec_class(name: str) -> type[TimeSpec]:
    """The class of a method; installed packages are asked only for a name that kvfold itself doesn't know."""
    if name not in TIME_SPECS:
        for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
            TIME_SPECS[name] = entry.load()
            break
        else:
            installed = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
            raise unknown_name("time method", name, installed | set(TIME_SPECS))
    return TIME_SPECS[name]


def parse_time(text: str) -> TimeSpec:
    """The spec of one text form, such as `full`, `window:64+4`, `h2o:25%+25%`, `dmc:inf`."""
    name, colon, args = (part.strip() for part in text.partition(":"))
    spec_class = time_spec_class(name)
    if colon and not args:
        raise ValueError(f"'{text.strip()}': nothing follows the colon: write '{name}' or give its settings")
    return spec_class.parse(args)
