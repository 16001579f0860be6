import pytest

from sandshift.errors import NoRoom
from sandshift.sandbox.model import Container, Sandbox, check_room

CRI = "io.kubernetes.cri.sandbox-id"


@pytest.mark.parametrize(
    ("annotations", "may"),
    [
        ({}, True),
        ("true", True),
        (" True", True),
        ("1", True),
        ("false", False),
        ("0", False),
        ("maybe", None),
        ("", None),
    ],
)
def test_the_annotation_says_whether_a_sandbox_may_move_and_its_absence_is_yes(annotations, may):
    said = annotations if annotations == {} else {"io.microsoft.migration.support-enabled": annotations}
    assert Sandbox("box", annotations=said).may_migrate is may


def test_a_sandbox_under_its_new_id_is_named_so_in_its_containers_annotations():
    workload = Container("g1", "c1", annotations={CRI: "old", "x": "y"})
    stranger = Container("g2", "c2", annotations={CRI: "other"})
    bare = Container("g3", "c3")
    moved = Sandbox("old", containers=(workload, stranger, bare)).moved_into("new")
    assert moved.sandbox_id == "new"
    assert [dict(one.annotations) for one in moved.containers] == [{CRI: "new", "x": "y"}, {CRI: "other"}, {}]
    assert moved.moved_into("new") == moved


def test_more_containers_or_disks_than_allowed_are_no_room():
    sandbox = Sandbox("box", containers=(Container("g1", "c1"), Container("g2", "c2")))
    check_room(sandbox, disks=3, containers_max=2, disks_max=3)
    with pytest.raises(NoRoom, match="sandbox box has 2 containers: at most 1 are allowed"):
        check_room(sandbox, disks=3, containers_max=1, disks_max=3)
    with pytest.raises(NoRoom, match="sandbox box has 3 disks: at most 2 are allowed"):
        check_room(sandbox, disks=3, containers_max=2, disks_max=2)
