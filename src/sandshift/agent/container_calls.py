"""The calls about containers: each checked here and handed to `Containers`. Every call may be repeated."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sandshift.agent.containers import Containers
from sandshift.agent.incidents import Incidents
from sandshift.agent.pod import Pod
from sandshift.agent.table import Table
from sandshift.wire.sandshift import agent_pb2 as pb
from sandshift.wire.sandshift.agent_ttrpc import AgentService
from ttrpc import CallContext


class ContainerCalls(AgentService):
    """The part of the Agent service that is about containers."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._pod = Pod()
        self._incidents = Incidents()
        self._containers = Containers(table, self._pod, self._incidents)

    async def prepare_pod(self, request: pb.PreparePodRequest, context: CallContext) -> pb.PreparePodResponse:
        del context
        self._pod.prepare(
            hosts=request.hosts,
            resolv_conf=request.resolv_conf,
            shm_bytes=request.shm_bytes,
            sysctls=request.sysctls,
        )
        return pb.PreparePodResponse()

    async def create_container(
        self, request: pb.CreateContainerRequest, context: CallContext
    ) -> pb.CreateContainerResponse:
        del context
        return pb.CreateContainerResponse(pid=(await self._containers.create(request)).pid)

    async def start_container(
        self, request: pb.StartContainerRequest, context: CallContext
    ) -> pb.StartContainerResponse:
        del context
        await self._containers.start(request.container_id)
        return pb.StartContainerResponse()

    async def delete_container(
        self, request: pb.DeleteContainerRequest, context: CallContext
    ) -> pb.DeleteContainerResponse:
        del context
        await self._containers.delete(request.container_id)
        return pb.DeleteContainerResponse()

    async def pause_container(
        self, request: pb.PauseContainerRequest, context: CallContext
    ) -> pb.PauseContainerResponse:
        del context
        await self._containers.get(request.container_id).group.freeze(frozen=True)
        return pb.PauseContainerResponse()

    async def resume_container(
        self, request: pb.ResumeContainerRequest, context: CallContext
    ) -> pb.ResumeContainerResponse:
        del context
        await self._containers.get(request.container_id).group.freeze(frozen=False)
        return pb.ResumeContainerResponse()

    async def update_container(
        self, request: pb.UpdateContainerRequest, context: CallContext
    ) -> pb.UpdateContainerResponse:
        del context
        await self._containers.update(request.container_id, request.resources)
        return pb.UpdateContainerResponse()

    async def container_stats(
        self, request: pb.ContainerStatsRequest, context: CallContext
    ) -> pb.ContainerStatsResponse:
        del context
        return pb.ContainerStatsResponse(**self._containers.get(request.container_id).group.stats())

    async def container_pids(
        self, request: pb.ContainerPidsRequest, context: CallContext
    ) -> pb.ContainerPidsResponse:
        del context
        listed = self._containers.pids(request.container_id)
        return pb.ContainerPidsResponse(
            processes=[pb.ContainerProcess(pid=pid, process_id=process_id) for pid, process_id in listed]
        )

    async def container_events(
        self, request: pb.ContainerEventsRequest, context: CallContext
    ) -> AsyncIterator[pb.ContainerEventsResponse]:
        del context
        async for one in self._incidents.follow(request.from_number):
            yield pb.ContainerEventsResponse(
                number=one.number, container_id=one.container_id, kind=one.kind, at_ns=one.at_ns
            )
