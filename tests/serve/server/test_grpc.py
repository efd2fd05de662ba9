"""The protocol over gRPC, as Triton's client and health checks use it."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient import grpc as triton
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import UsageError
from ffl_deploy.images import decode, prepare
from serve.command import parse_arguments
from serve.server.protocol import ProtocolError
from serve.server.rpc import messages, port
from serve.server.rpc.port import Reading, ended
from serve.server.settings import Limits, ModelSpec, Settings

Two = tuple[Bundle, Bundle]
TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def running(two_bundles: Two, start_server: Any) -> Iterator[Any]:
    models = tuple(ModelSpec(bundle.name, bundle.folder) for bundle in two_bundles)
    settings = Settings(models, demo=False, grpc_port=0, model_control=True, access_log=True)
    with start_server(settings) as server:
        yield server


@pytest.fixture
def client(running: Any) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{running.service.grpc_port}") as found:
        yield found


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)


def tensor_of(images: np.ndarray) -> Any:
    return triton.InferInput("images", list(images.shape), "UINT8").set_data_from_numpy(images)


def test_tritonclient_gets_the_bits_of_the_session(client: Any, running: Any, two_bundles: Two) -> None:
    for bundle in two_bundles:
        session = running.service.models[bundle.name].session
        for count in (1, 7, 32):
            result = client.infer(bundle.name, [tensor_of(pixels(count))], request_id="r1")
            expected = session.run(pixels(count))
            assert result.get_response().id == "r1"
            assert result.as_numpy("logits").tobytes() == expected.logits.tobytes()
            assert result.as_numpy("probabilities").tobytes() == expected.probabilities.tobytes()


def test_files_and_labels(client: Any, running: Any, two_bundles: Two, photo: Any) -> None:
    bundle, files = two_bundles[0], [photo(1), photo(2, "PNG")]
    tensor = triton.InferInput("encoded", [2], "BYTES").set_data_from_numpy(np.array(files, np.object_))
    wanted = [triton.InferRequestedOutput("probabilities", class_count=2)]
    labels = client.infer("fused", [tensor], outputs=wanted).as_numpy("probabilities")
    ready = np.stack([prepare(decode(file).pixels, bundle.preprocessing) for file in files])
    best = running.service.models["fused"].session.run(ready).probabilities.argmax(1)
    assert [row[0].decode().split(":")[2] for row in labels] == [bundle.classes[i] for i in best]


def test_what_metadata_advertises_works(client: Any, running: Any, two_bundles: Two) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert set(client.get_server_metadata().extensions) == {
        "binary_tensor_data", "classification", "model_configuration", "statistics", "model_repository",
    }  # fmt: skip
    assert client.is_model_ready("fused")
    assert not client.is_model_ready("fused", "2")
    assert not client.is_model_ready("other")
    assert list(client.get_model_metadata("fused").inputs[0].shape) == [-1, 32, 32, 3]
    config = client.get_model_config("fused", as_json=True)["config"]
    assert (config["max_batch_size"], config["input"][0]["data_type"]) == (64, "TYPE_UINT8")
    before = int(client.get_inference_statistics("fused").model_stats[0].inference_count)
    client.infer("fused", [tensor_of(pixels(3))])
    assert client.get_inference_statistics("fused").model_stats[0].inference_count == before + 3
    assert len(client.get_inference_statistics().model_stats) == 2
    client.unload_model("branch0")
    states = {model.name: model.state for model in client.get_model_repository_index().models}
    assert states == {"fused": "READY", "branch0": "UNAVAILABLE"}
    client.load_model("branch0")
    assert client.is_model_ready("branch0")
    classes = call(running, "ModelMetadata", {"name": "fused"}).properties["classes"]
    assert json.loads(classes) == list(two_bundles[0].classes)


def test_a_stream_answers_in_order_and_survives_a_bad_request(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(3):
        client.async_stream_infer(
            "fused" if number != 1 else "other", [tensor_of(pixels(2))], request_id=str(number)
        )
    found = [answers.get(timeout=60) for _ in range(3)]
    client.stop_stream()
    assert [error is None for _, error in found] == [True, False, True]
    assert "no such model" in str(found[1][1])
    assert [found[0][0].get_response().id, found[2][0].get_response().id] == ["0", "2"]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed(client: Any, running: Any, algorithm: str) -> None:
    result = client.infer("fused", [tensor_of(pixels(8))], compression_algorithm=algorithm)
    expected = running.service.models["fused"].session.run(pixels(8)).logits
    assert result.as_numpy("logits").tobytes() == expected.tobytes()


def call(
    running: Any, method: str, fields: dict[str, Any], service: str = messages.INFERENCE, **how: Any
) -> Any:
    """-> the answer to one call with our own messages, which know the protocol's `properties` too."""
    described = messages.pool().FindServiceByName(service).methods_by_name[method]
    asked = messages.message(described.input_type.full_name)(**fields)
    with grpc.insecure_channel(f"127.0.0.1:{running.service.grpc_port}") as channel:
        answer = messages.message(described.output_type.full_name)
        ask = channel.unary_unary(
            f"/{service}/{method}", lambda one: one.SerializeToString(), answer.FromString
        )
        return ask(asked, timeout=60, **how)


def test_typed_contents_are_taken_too(running: Any) -> None:
    image = pixels(1)
    contents = {"uint_contents": image.ravel().tolist()}
    fields = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "contents": contents}
    answer = call(running, "ModelInfer", {"model_name": "fused", "inputs": [fields]})
    assert (answer.outputs[0].name, list(answer.outputs[0].shape)) == ("logits", [1, 3])
    expected = running.service.models["fused"].session.run(image).logits
    assert answer.raw_output_contents[0] == expected.tobytes()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model_name": "other"}, "NOT_FOUND", "no such model"),
        ({"inputs": []}, "INVALID_ARGUMENT", "exactly one input"),
        ({"raw_input_contents": []}, "INVALID_ARGUMENT", "an element for each input"),
        ({"raw_input_contents": [b"x"]}, "INVALID_ARGUMENT", "has 1 bytes, its shape needs 3072"),
        ({"outputs": [{"name": "nothing"}]}, "INVALID_ARGUMENT", "unknown output"),
        (
            {"outputs": [{"name": "logits", "parameters": {"shared_memory_region": {"string_param": "r"}}}]},
            "INVALID_ARGUMENT",
            "shared memory is not supported",
        ),
    ],
    ids=["model", "inputs", "raw", "size", "output", "shared-memory"],
)
def test_a_wrong_request_is_refused_with_its_reason(
    running: Any, change: dict[str, Any], code: str, words: str
) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    fields = {"model_name": "fused", "inputs": [tensor], "raw_input_contents": [pixels(1).tobytes()]}
    with pytest.raises(grpc.RpcError) as caught:
        call(running, "ModelInfer", {**fields, **change})
    assert (caught.value.code().name, words in caught.value.details()) == (code, True), caught.value.details()


def test_shared_memory_is_refused_by_its_registration(client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"UNIMPLEMENTED"):
        client.register_system_shared_memory("region", "/region", 10)


def test_health_is_that_of_the_server(running: Any) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{running.service.grpc_port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", messages.INFERENCE):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watched = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watched).status == 1
        watched.cancel()


def test_the_token_is_asked_for_except_by_health(two_bundles: Two, start_server: Any) -> None:
    settings = Settings((ModelSpec("fused", two_bundles[0].folder),), demo=False, grpc_port=0, token=TOKEN)
    with start_server(settings) as running:
        assert call(running, "ServerReady", {}).ready
        assert call(running, "Check", {}, messages.HEALTH).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            call(running, "ServerMetadata", {})
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        assert call(running, "ServerMetadata", {}, metadata=metadata).name == "ffl-serve"


def test_a_message_over_the_limit_is_refused_packed_or_not(two_bundles: Two, start_server: Any) -> None:
    limits = Limits(message_bytes=100_000)
    models = (ModelSpec("fused", two_bundles[0].folder),)
    with start_server(Settings(models, demo=False, grpc_port=0, limits=limits)) as running:
        asked = {"model_name": "fused", "raw_input_contents": [bytes(50_000_000)]}
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            with pytest.raises(grpc.RpcError) as caught:
                call(running, "ModelInfer", asked, compression=compression)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert httpx.get(f"{running.url}/v2/health/ready").status_code == 200


def test_a_request_id_comes_back_and_is_logged(running: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ffl.serve")
    with grpc.insecure_channel(f"127.0.0.1:{running.service.grpc_port}") as channel:
        ask = channel.unary_unary(f"/{messages.INFERENCE}/ServerLive")
        _, done = ask.with_call(b"", metadata=(("x-request-id", "mine-1"),))
        assert dict(done.trailing_metadata())["x-request-id"] == "mine-1"
    assert "mine-1" in [getattr(record, "request_id", "") for record in caplog.records]
    assert 'ffl_requests_total{route="grpc_other",status="OK"}' in httpx.get(f"{running.url}/metrics").text


def test_what_would_fill_the_memory_is_counted_before_it_is_parsed() -> None:
    kind = messages.message("ModelInferRequest")
    with pytest.raises(ProtocolError, match="more fields"):
        messages.parsed(kind, b"\x2a\x00" * 100_000)  # inputs, all empty
    inside = b"\x22\x00" * 100_000  # parameters, all empty
    length = bytes([len(inside) & 0x7F | 0x80, len(inside) >> 7 & 0x7F | 0x80, len(inside) >> 14])
    with pytest.raises(ProtocolError, match="more fields"):
        messages.parsed(kind, b"\x2a" + length + inside)
    for broken in (b"\x2a", b"\x2a\x05", b"\xff" * 12, b"\x0b"):
        with pytest.raises(ProtocolError, match="cannot be read"):
            messages.parsed(kind, broken)
    assert messages.parsed(kind, b"").model_name == ""


def test_a_message_that_does_not_come_makes_room() -> None:
    """Ten calls that never send theirs hold all places; one that does still gets one, within its patience."""

    async def never(reading: Reading) -> str:
        try:
            async with reading.within(60):
                await asyncio.sleep(60)
        except TimeoutError:
            return "ended"
        return "answered"

    async def both() -> tuple[list[str], bool]:
        reading = Reading(10)
        waiting = [asyncio.ensure_future(never(reading)) for _ in range(10)]
        await asyncio.sleep(0)
        async with asyncio.timeout(30), reading.within(60):
            pass
        done, pending = await asyncio.wait(waiting, timeout=0.2)
        for one in pending:
            one.cancel()
        return [one.result() for one in done], len(pending) == 9

    assert asyncio.run(both()) == (["ended"], True)


def test_the_descriptors_are_those_of_the_clients() -> None:
    """Every field of ours has the number, type and name that it has in Triton's own messages."""
    theirs = {file.name: file for file in (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR)}
    by_name = {name: found for file in theirs.values() for name, found in file.message_types_by_name.items()}
    checked = 0
    for name in messages.pool().FindFileByName("open_inference.proto").message_types_by_name:
        ours = messages.message(name).DESCRIPTOR
        for field in ours.fields:
            other = by_name[name].fields_by_number.get(field.number)
            if (name, field.name) == ("ModelMetadataResponse", "properties"):
                continue  # of the protocol's own, which Triton's lacks
            assert other is not None
            assert (other.name, other.type, other.is_repeated) == (field.name, field.type, field.is_repeated)
            checked += 1
    assert checked > 80


def test_the_descriptors_are_made_of_the_files_beside_them() -> None:
    """What the .proto files say is what the server reads: names, numbers and methods, in their order."""
    folder = Path(messages.__file__).parent
    found = messages.pool()
    for file, package in (("open_inference.proto", "inference"), ("health.proto", "grpc.health.v1")):
        text = (folder / file).read_text(encoding="utf-8")
        described = found.FindFileByName(file)
        assert described.package == package
        for kind in described.message_types_by_name.values():
            assert f"message {kind.name} {{" in text
            for field in kind.fields:
                assert f" {field.name} = {field.number};" in text
        for service in described.services_by_name.values():
            assert [method.name for method in service.methods] == [
                line.split()[1].partition("(")[0] for line in text.splitlines() if line.startswith("  rpc ")
            ]


def test_the_port_is_asked_for_and_checked(two_bundles: Two) -> None:
    folder = str(two_bundles[0].folder)
    assert parse_arguments([folder]).grpc_port is None
    assert parse_arguments([folder, "--grpc-port", "0"]).grpc_port == 0
    for wrong in ("70000", "7860"):
        with pytest.raises(UsageError, match="--grpc-port"):
            parse_arguments([folder, "--grpc-port", wrong])


def test_a_drained_process_ends_its_calls(two_bundles: Two, serve_process: Any) -> None:
    with serve_process(str(two_bundles[0].folder), "--no-demo", "--grpc-port", "0") as running:
        lines = [json.loads(line) for line in running.read_log().splitlines()]
        (port,) = [line["grpc_port"] for line in lines if line["message"] == "ready"]
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            name = two_bundles[0].name
            assert client.infer(name, [tensor_of(pixels(1))]).as_numpy("logits").shape == (1, 3)
            running.process.terminate()
            assert running.process.wait(60) == 0
            with pytest.raises(InferenceServerException):
                client.infer(name, [tensor_of(pixels(1))])


def test_a_port_that_never_says_that_it_has_stopped_ends_once_no_call_is_left() -> None:
    """gRPC's accepting task may wait for ever, and the server with it, until it was killed."""

    async def waited(calls: Any, seconds: float) -> bool:
        """-> whether the stop was cancelled."""
        never = asyncio.get_running_loop().create_future()
        await asyncio.wait_for(ended(never, calls, seconds), 60)
        return never.cancelled()

    async def one_call_ends_later() -> int:
        calls = SimpleNamespace(open=1)
        ending = asyncio.create_task(waited(calls, 100.0))
        await asyncio.sleep(0.1)
        assert not ending.done()  # the call still gets its time
        calls.open = 0
        assert await ending
        return calls.open

    async def stopped() -> bool:
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        await ended(done, SimpleNamespace(open=3), 100.0)  # type: ignore[arg-type]
        return done.cancelled()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "QUIET_SECONDS", 0.01)
        assert asyncio.run(waited(SimpleNamespace(open=0), 100.0))
        assert asyncio.run(waited(SimpleNamespace(open=1), 0.05))  # a call that does not end
        assert asyncio.run(one_call_ends_later()) == 0
        assert not asyncio.run(stopped())
