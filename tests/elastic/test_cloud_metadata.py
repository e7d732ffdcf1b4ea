"""What three clouds' metadata services say, asked of servers that speak their protocols; no Ray."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from orchestrator.elastic.cloud_metadata import (
    Cloud,
    Hint,
    MetadataClient,
    MetadataError,
    Notice,
    detect_cloud,
    metadata_client,
)
from orchestrator.elastic.node_drainer import NodeDrainer
from orchestrator.elastic.preemption_agent import NoticeWatcher, watched_cloud
from orchestrator.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from metadata_servers import AwsServer, AzureServer, GceServer, MetadataServer

Server = TypeVar("Server", bound=MetadataServer)
Serve = Callable[[type[Server]], Server]


@pytest.fixture
def serve() -> Iterator[Serve[Any]]:
    with ExitStack() as servers:

        def start(kind: type[Server]) -> Server:
            server = kind()
            servers.enter_context(server)
            return server

        yield start


def client(cloud: Cloud, server: MetadataServer) -> MetadataClient:
    return metadata_client(cloud, {f"ORCHESTRATOR_{cloud.upper()}_METADATA_URL": server.url})


def test_aws_says_nothing_until_it_interrupts(serve: Serve[Any]) -> None:
    server = serve(AwsServer)
    aws = client("aws", server)
    assert aws.poll() == []
    ends = server.interrupt(in_s=100)
    (notice,) = aws.poll()
    assert isinstance(notice, Notice)
    assert notice.deadline == ends
    assert "terminate" in notice.source
    assert server.count("/latest/api/token") == 1, "one session token serves many polls"


def test_aws_gets_a_new_token_when_the_old_one_is_refused(serve: Serve[Any]) -> None:
    server = serve(AwsServer)
    aws = client("aws", server)
    aws.poll()
    server.token = "another-token"
    server.interrupt(in_s=100)
    assert isinstance(aws.poll()[0], Notice)
    assert server.count("/latest/meta-data/spot/instance-action", 401) == 1


def test_a_rebalance_recommendation_is_a_hint_and_an_interruption_outranks_it(serve: Serve[Any]) -> None:
    server = serve(AwsServer)
    server.recommend_rebalance()
    aws = client("aws", server)
    assert aws.poll() == [Hint("AWS rebalance recommendation")]
    server.interrupt(in_s=100)
    server.said["events/recommendations/rebalance"] = "no JSON"
    assert [type(found) for found in aws.poll()] == [Notice]


def test_a_time_that_has_passed_leaves_a_moment_for_a_checkpoint(serve: Serve[Any]) -> None:
    server = serve(AwsServer)
    server.interrupt(in_s=-3600)
    (notice,) = client("aws", server).poll()
    assert isinstance(notice, Notice)
    assert notice.deadline > time.time() + 1


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("preempted", "TRUE", Notice),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", Notice),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", Hint),
    ],
)
def test_gce(serve: Serve[Any], name: str, value: str, kind: type) -> None:
    server = serve(GceServer)
    gce = client("gce", server)
    assert gce.poll() == []
    server.said[name] = value
    (found,) = gce.poll()
    assert type(found) is kind
    if isinstance(found, Notice):
        promised = 30 if name == "preempted" else 60
        assert 0 < found.deadline - time.time() <= promised


@pytest.mark.parametrize(
    ("event", "kind"),
    [("Preempt", Notice), ("Terminate", Notice), ("Reboot", Notice), ("Redeploy", Notice), ("Freeze", Hint)],
)
def test_azure(serve: Serve[Any], event: str, kind: type) -> None:
    server = serve(AzureServer)
    azure = client("azure", server)
    assert azure.poll() == []
    ends = server.schedule(event, in_s=30)
    (found,) = azure.poll()
    assert type(found) is kind
    if isinstance(found, Notice):
        assert found.deadline == ends


def test_azure_events_of_other_machines_and_those_called_off_are_not_ours(serve: Serve[Any]) -> None:
    server = serve(AzureServer)
    server.schedule("Preempt", in_s=30, machine="spot_4")
    server.schedule("Preempt", in_s=30, status="Canceled")
    azure = client("azure", server)
    assert azure.poll() == []
    server.schedule("Preempt", in_s=30, machine="SPOT_3", status="Started")
    (found,) = azure.poll()
    assert isinstance(found, Notice)
    assert found.deadline > time.time()


@pytest.mark.parametrize(("cloud", "kind"), [("aws", AwsServer), ("gce", GceServer), ("azure", AzureServer)])
@pytest.mark.parametrize("how", [pytest.param("silent", marks=pytest.mark.heavy), "error", "garbage"])
def test_what_no_cloud_would_say_is_an_outage(
    serve: Serve[Any], cloud: Cloud, kind: type[MetadataServer], how: str
) -> None:
    server = serve(kind)
    server.broken = how
    with pytest.raises(MetadataError):
        client(cloud, server).poll()


def test_documents_that_are_not_what_the_cloud_documents_are_an_outage(serve: Serve[Any]) -> None:
    aws, gce, azure = serve(AwsServer), serve(GceServer), serve(AzureServer)
    aws.said["spot/instance-action"] = {"action": "terminate", "time": "soon"}
    gce.said["preempted"] = "MAYBE"
    azure.said["events"] = [{"EventType": "Preempt", "EventStatus": "Scheduled", "NotBefore": "soon"}]
    for cloud, server in (("aws", aws), ("gce", gce), ("azure", azure)):
        with pytest.raises(MetadataError):
            client(cloud, server).poll()


def test_one_event_that_cannot_be_read_does_not_hide_another(serve: Serve[Any]) -> None:
    server = serve(AzureServer)
    server.said["events"].append({"EventType": "Preempt"})
    server.schedule("Preempt", in_s=30)
    assert [type(found) for found in client("azure", server).poll()] == [Notice]


def test_a_server_of_another_cloud_is_not_believed(serve: Serve[Any]) -> None:
    with pytest.raises(MetadataError):
        client("gce", serve(AzureServer)).poll()
    with pytest.raises(MetadataError):
        client("aws", serve(GceServer)).poll()
    # As of a hotel's login page: right words, but not Google's.
    unsigned = serve(GceServer)
    unsigned.said["preempted"], unsigned.signs = "TRUE", False
    with pytest.raises(MetadataError):
        client("gce", unsigned).poll()


FIRMWARE = {
    "aws": {"sys_vendor": "Amazon EC2", "bios_vendor": "Amazon EC2"},
    "gce": {"sys_vendor": "Google", "product_name": "Google Compute Engine"},
    "azure": {
        "sys_vendor": "Microsoft Corporation",
        "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77",
    },
}


@pytest.mark.parametrize("cloud", FIRMWARE)
def test_a_machine_of_a_cloud_is_known_by_its_firmware(tmp_path: Path, cloud: str) -> None:
    for name, text in FIRMWARE[cloud].items():
        (tmp_path / name).write_text(f"{text}\n")
    assert detect_cloud({}, tmp_path) == cloud


def test_other_machines_are_of_no_cloud(tmp_path: Path) -> None:
    assert detect_cloud({}, tmp_path / "no-firmware") is None
    (tmp_path / "sys_vendor").write_text("Microsoft Corporation\n")
    (tmp_path / "chassis_asset_tag").write_text("a Hyper-V machine of one's own\n")
    assert detect_cloud({}, tmp_path) is None


def test_an_address_in_the_environment_is_a_wish_to_be_asked(tmp_path: Path) -> None:
    assert detect_cloud({"ORCHESTRATOR_GCE_METADATA_URL": "http://127.0.0.1:1"}, tmp_path) == "gce"
    assert watched_cloud("azure") == "azure"
    assert watched_cloud("kubernetes") is None
    with pytest.raises(UserError, match="http://HOST"):
        metadata_client("aws", {"ORCHESTRATOR_AWS_METADATA_URL": "169.254.169.254"})


class Drains(NodeDrainer):
    """A node whose cluster answers or does not."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1", "node")
        self.drained: list[Notice] = []
        self.down = False

    def drain(self, notice: Notice) -> bool:
        if self.down:
            raise RuntimeError("the cluster does not answer")
        self.drained.append(notice)
        return True


def test_hints_drain_nothing_and_are_said_once(serve: Serve[Any]) -> None:
    server, node, lines = serve(AwsServer), Drains(), list[str]()
    server.recommend_rebalance()
    watcher = NoticeWatcher(client("aws", server), node, lines.append)
    for _ in range(3):
        watcher.step()
    assert node.drained == []
    assert len(lines) == 1
    assert "rebalance" in lines[0]


def test_an_end_long_ahead_is_drained_for_when_it_is_near(serve: Serve[Any]) -> None:
    """Azure announces a redeployment 15 minutes ahead; a drained node would idle for all of them."""
    server, node = serve(AzureServer), Drains()
    server.schedule("Redeploy", in_s=900)
    watcher = NoticeWatcher(client("azure", server), node)
    watcher.step()
    assert node.drained == []
    server.said["events"].clear()
    server.schedule("Redeploy", in_s=60)
    watcher.step()
    assert len(node.drained) == 1


def test_outages_of_the_service_and_of_the_cluster_are_survived(serve: Serve[Any]) -> None:
    server, node, lines = serve(GceServer), Drains(), list[str]()
    watcher = NoticeWatcher(client("gce", server), node, lines.append)
    usual = watcher.pause_s()
    server.broken = "error"
    for _ in range(20):
        watcher.step()
    assert usual < watcher.pause_s() < 25, "it asks less often, and still within a notice"
    server.broken = None
    server.said["preempted"] = "TRUE"
    node.down = True
    watcher.step()
    watcher.step()
    assert watcher.pause_s() == usual
    node.down = False
    watcher.step()
    assert len(node.drained) == 1
    assert sum("does not answer" in line and "metadata" in line for line in lines) == 1
    assert sum("answers again" in line for line in lines) == 1
