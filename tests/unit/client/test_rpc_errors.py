"""Statuses become exceptions; driven through grpcio-testing's channel, without a server."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import grpc_testing
import pytest
from google.rpc import error_details_pb2, status_pb2
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_client import Client, errors

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]


def failure_of(
    code: grpc.StatusCode,
    details: str,
    trailers: tuple[tuple[str, bytes], ...] = (),
) -> errors.RpcError:
    """What get_model raises where the server answers with this status."""
    channel = grpc_testing.channel([SERVICE], grpc_testing.strict_real_time())
    with ThreadPoolExecutor(1) as pool:
        call: Future[object] = pool.submit(Client("host:1", channel=channel).get_model)
        _, _, rpc = channel.take_unary_unary(SERVICE.methods_by_name["GetModel"])
        rpc.terminate(pb.GetModelResponse(), trailers, code, details)
        error = call.exception(10)
    assert isinstance(error, errors.RpcError)
    return error


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgumentError),
        (grpc.StatusCode.ALREADY_EXISTS, errors.AlreadyExistsError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhaustedError),
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceededError),
        (grpc.StatusCode.CANCELLED, errors.RequestCancelledError),
        (grpc.StatusCode.ABORTED, errors.AbortedError),
        (grpc.StatusCode.OUT_OF_RANGE, errors.NotRetainedError),
        (grpc.StatusCode.INTERNAL, errors.ServerError),
        (grpc.StatusCode.UNKNOWN, errors.ServerError),
    ],
)
def test_each_status_has_its_exception(code: grpc.StatusCode, kind: type[errors.RpcError]) -> None:
    error = failure_of(code, "what happened")
    assert type(error) is kind
    assert (error.code, str(error)) == (code.name, "what happened")


def test_details_are_read_whatever_their_order() -> None:
    status = status_pb2.Status(code=14, message="loading")
    for detail in (
        error_details_pb2.ErrorInfo(reason="MODEL_LOADING", domain="stepwire"),
        error_details_pb2.DebugInfo(detail="of no use here"),
        error_details_pb2.RetryInfo(retry_delay={"seconds": 2}),
    ):
        status.details.add().Pack(detail)
    error = failure_of(
        grpc.StatusCode.UNAVAILABLE,
        "loading",
        (("grpc-status-details-bin", status.SerializeToString()),),
    )
    assert (error.reason, error.retry_after_s) == ("MODEL_LOADING", 2.0)


def test_broken_details_do_not_hide_the_error() -> None:
    error = failure_of(
        grpc.StatusCode.ABORTED, "gone", (("grpc-status-details-bin", b"\xff\xff\xff"),)
    )
    assert str(error) == "gone"
    assert isinstance(error, errors.AbortedError)


def test_a_server_of_another_kind_is_named() -> None:
    error = failure_of(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    assert str(error) == "the server at host:1 does not speak stepwire.scheduler.v1"


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    named = set((errors.__doc__ or "").split())
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined <= named


CONNECTING = "failed to connect to all addresses; last error: "


@pytest.mark.parametrize(
    ("details", "kind", "fix"),
    [
        ("UNKNOWN: Connection refused", errors.UnavailableError, "stepwire serve MODEL"),
        ("UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed", errors.UnavailableError, "--tls-ca FILE"),
        ("UNAVAILABLE: recvmsg:Connection reset", errors.UnavailableError, "--tls-cert and"),
        ("UNAVAILABLE: sendmsg: Broken pipe", errors.UnavailableError, "--tls-cert and"),
        (
            "UNKNOWN: Failed to connect to remote host: connect: No route to host",
            errors.UnavailableError,
            "stepwire serve MODEL",
        ),
        (
            "UNAVAILABLE: Handshake read failed (Endpoint closing)",  # it took too long
            errors.UnavailableError,
            "stepwire serve MODEL",
        ),
        ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer", errors.TlsError, "--tls-ca FILE"),
        (
            "CERTIFICATE_VERIFY_FAILED: certificate has expired",
            errors.TlsError,
            "must issue a new one",
        ),
        ("Hostname Verification Check failed.", errors.TlsError, "--tls-server-name"),
        ("SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER", errors.TlsError, "plain text"),
        ("Failed to create security handshaker.", errors.TlsError, "no usable certificate or key"),
    ],
)
def test_what_fails_before_a_word_is_said_names_its_fix(
    details: str, kind: type[errors.RpcError], fix: str
) -> None:
    error = failure_of(grpc.StatusCode.UNAVAILABLE, CONNECTING + details)
    assert type(error) is kind
    assert fix in str(error)


def test_a_refused_token_names_its_fix() -> None:
    error = failure_of(grpc.StatusCode.UNAUTHENTICATED, "go away")
    assert type(error) is errors.AuthenticationError
    assert "STEPWIRE_TOKEN" in str(error)
