"""From a spec to the policy that carries it out. Third parties add theirs through the entry-point group `kvfold.policies`."""

from importlib.metadata import entry_points

from kvfold.policies.base import Policy
from kvfold.policies.dmc import DMCPolicy
from kvfold.policies.dms import DMSPolicy
from kvfold.policies.full import FullPolicy
from kvfold.policies.h2o import H2OPolicy
from kvfold.policies.tova import TOVAPolicy
from kvfold.policies.window import WindowPolicy
from kvfold.specs.base import TimeSpec

POLICIES: dict[str, type[Policy]] = {
    "full": FullPolicy, "window": WindowPolicy, "h2o": H2OPolicy, "tova": TOVAPolicy, "dmc": DMCPolicy, "dms": DMSPolicy
}  # fmt: skip

ENTRY_POINT_GROUP = "kvfold.policies"


def policy_of(spec: TimeSpec) -> Policy:
    """The policy of a spec; installed packages are asked only for a name that kvfold itself doesn't know."""
    if spec.name not in POLICIES:
        for entry in entry_points(group=ENTRY_POINT_GROUP, name=spec.name):
            POLICIES[spec.name] = entry.load()
            break
        else:
            raise ValueError(
                f"'{spec.format()}': {spec.name} has a spec but no policy: install the package that brings it, "
                f"or use one of {', '.join(sorted(POLICIES))}"
            )
    return POLICIES[spec.name](spec)
