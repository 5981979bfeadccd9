"""Every error has one status, with details that any gRPC library decodes."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2
from stepwire_scheduler import errors
from stepwire_scheduler.errors import FieldViolation, InvalidRequestError, SchedulerError
from stepwire_scheduler.rpc_status import to_rpc_status


def all_kinds(kind: type[SchedulerError] = SchedulerError) -> list[type[SchedulerError]]:
    kinds = [kind]
    for child in kind.__subclasses__():
        kinds += all_kinds(child)
    return kinds


def example(kind: type[SchedulerError]) -> SchedulerError:
    if kind is InvalidRequestError:
        return InvalidRequestError([FieldViolation(field="input", description="must be set")])
    return kind() if kind is errors.DrainingError else kind("words")


@pytest.mark.parametrize("kind", all_kinds())
def test_every_error_has_a_code_a_reason_and_a_message(kind: type[SchedulerError]) -> None:
    error = example(kind)
    status = to_rpc_status(error, "r1")
    assert status.code == errors.status_code(error).value[0]
    assert status.code not in {grpc.StatusCode.OK.value[0], grpc.StatusCode.UNKNOWN.value[0]}
    assert status.message == error.message
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason.isupper()
    assert info.metadata["request_id"] == "r1"


@pytest.mark.parametrize("kind", all_kinds())
def test_every_error_stands_in_the_tree_at_the_top_of_its_module(
    kind: type[SchedulerError],
) -> None:
    if kind.__module__ == errors.__name__:
        assert errors.__doc__ is not None
        assert kind.__name__ in errors.__doc__


def test_retry_info_is_there_exactly_where_a_retry_can_help() -> None:
    retried = {
        kind
        for kind in all_kinds()
        if any(
            detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
            for detail in to_rpc_status(example(kind)).details
        )
    }
    assert retried == {
        errors.QueueFullError,
        errors.QuotaExceededError,
        *all_kinds(errors.UnavailableError),
    }


def test_the_largest_status_fits_into_metadata() -> None:
    violations = [
        FieldViolation(field=f"input.sampling_params.logit_bias[{2**32 - 1}]", description="x" * 90)
    ] * 1_000
    assert len(to_rpc_status(InvalidRequestError(violations)).SerializeToString()) < 6 * 1024
