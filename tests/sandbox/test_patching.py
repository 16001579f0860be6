import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import AlreadyThere, Damaged, IllegalMove, NotFound
from sandshift.sandbox import patching
from sandshift.sandbox.model import Container, Sandbox
from sandshift.sandbox.patching import Mount, Patch, Patching

SANDBOX = Sandbox(
    "box", containers=(Container("g0", "pause", pid=1), Container("g1", "web", 7), Container("g2", "db", 9))
)
PATCHES = (
    Patch("pause", "new-pause", "/b/0"),
    Patch("web", "new-web", "/b/1"),
    Patch("db", "new-db", "/b/2"),
)


@pytest.mark.parametrize("order", list(itertools.permutations(PATCHES)))
def test_patches_come_in_any_order_and_the_sandbox_container_is_one_of_them(order):
    state = Patching(SANDBOX)
    assert state.pending == ("db", "pause", "web")
    for patch in order:
        state = state.apply(patch)
    state.require_complete()
    assert [one.container_id for one in state.patched().containers] == ["new-pause", "new-web", "new-db"]
    assert [one.guest_id for one in state.patched().containers] == ["g0", "g1", "g2"]


def test_the_same_patch_again_changes_nothing_and_answers_the_saved_pid():
    state = Patching(SANDBOX).apply(PATCHES[1])
    assert state.apply(PATCHES[1]) is state
    assert state.pid_of("web") == 7
    assert state.pid_of("unknown") == 0
    assert state.patched_as("new-web") == PATCHES[1]
    assert state.patched_as("web") is None


def test_other_values_for_a_patched_container_are_refused_naming_them():
    state = Patching(SANDBOX).apply(PATCHES[1])
    with pytest.raises(AlreadyThere) as caught:
        state.apply(Patch("web", "other", "/b/9"))
    assert caught.value.message == (
        "container web of the source is new-web here already, made with other values: container_id, bundle"
    )
    assert state.pending == ("db", "pause")


def test_an_unknown_container_is_not_found():
    with pytest.raises(
        NotFound, match="has no container nginx that is pending a patch; pending: db, pause, web"
    ):
        Patching(SANDBOX).apply(Patch("nginx", "x"))
    with pytest.raises(NotFound, match="pending: none"):
        Patching(Sandbox("box")).apply(Patch("nginx", "x"))


def test_two_containers_cannot_get_one_id():
    state = Patching(SANDBOX).apply(PATCHES[1])
    with pytest.raises(
        AlreadyThere, match="container id new-web is taken here by container web of the source"
    ):
        state.apply(Patch("db", "new-web"))


def test_a_container_may_take_over_another_ones_id_of_the_source():
    state = Patching(SANDBOX).apply(Patch("web", "db")).apply(Patch("db", "web"))
    assert [one.container_id for one in state.patched().containers] == ["pause", "db", "web"]


def test_what_is_pending_is_named_sorted():
    with pytest.raises(
        IllegalMove, match=r"^containers db, pause of the source are pending a patch: create each"
    ):
        Patching(SANDBOX).apply(PATCHES[1]).require_complete()


@given(
    st.builds(
        Patch,
        st.text(max_size=5),
        st.text(max_size=5),
        st.text(max_size=5),
        rootfs=st.lists(
            st.builds(Mount, st.text(max_size=3), st.text(max_size=3), options=st.just(("ro",)))
        ).map(tuple),
        terminal=st.booleans(),
    )
)
def test_a_patch_survives_the_journal(patch):
    assert patching.patch_from_bytes(patching.patch_bytes(patch)) == patch


def test_bytes_that_are_no_patch_are_damage():
    with pytest.raises(Damaged, match="a patch in the journal cannot be read"):
        patching.patch_from_bytes(b"\x00")


@given(
    st.lists(st.tuples(st.sampled_from(["pause", "web", "db", "none"]), st.sampled_from("abc")), max_size=12)
)
def test_whatever_is_asked_for_ids_stay_apart_and_refusals_change_nothing(asked):
    state = Patching(SANDBOX)
    for source_id, container_id in asked:
        before = state
        try:
            state = state.apply(Patch(source_id, container_id))
        except (AlreadyThere, NotFound):
            assert state is before
    ids = [patch.container_id for patch in state.applied.values()]
    assert len(ids) == len(set(ids))
    assert set(state.pending) | state.applied.keys() == {"pause", "web", "db"}
    assert not set(state.pending) & state.applied.keys()
