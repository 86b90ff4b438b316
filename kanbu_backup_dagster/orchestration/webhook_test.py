"""Trying the webhook out: the job `test_webhook`, and the same for the command line.

What belongs here: one delivery of an example, marked `X-Kanbu-Test: true`. What does not: real alerts (`alerts`).
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

import uuid
from datetime import datetime, timezone

from dagster import OpExecutionContext, job, op

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.notifications.delivery import Receipt, deliver
from kanbu_backup_dagster.notifications.endpoints import Endpoint
from kanbu_backup_dagster.notifications.events import example_event
from kanbu_backup_dagster.orchestration import job_names
from kanbu_backup_dagster.orchestration.configuration import Configuration, load_configuration
from kanbu_backup_dagster.orchestration.failures import explained


def try_webhook(configuration: Configuration) -> tuple[Endpoint, Receipt]:
    """Deliver an example event, once.

    Returns:
        Where it went, and the answer.

    Raises:
        SettingsError: There is no webhook, or its settings cannot be used.
        DeliveryError: It was not accepted.
    """
    endpoint = configuration.webhook
    if endpoint is None:
        if configuration.settings_problems:
            raise SettingsError("\n".join(configuration.settings_problems))
        raise SettingsError("BACKUP_WEBHOOK_URL is not set: alerts go nowhere.", advice="Set it, and try again.")
    now = datetime.now(timezone.utc)
    return endpoint, deliver(example_event(f"test/{uuid.uuid4()}", now), endpoint, test=True)


@op(description="Posts an example event, marked X-Kanbu-Test: true, to BACKUP_WEBHOOK_URL.")
def send_example(context: OpExecutionContext) -> None:
    with explained():
        endpoint, receipt = try_webhook(load_configuration())
    context.log.info(f"[Notify] {endpoint.url.origin} answered {receipt.status} in {receipt.seconds:.2f} s")
    context.add_output_metadata(
        {"receiver": endpoint.url.origin, "form": endpoint.format.value, "status": receipt.status}
    )


@job(name=job_names.TEST_WEBHOOK, description="Tries the webhook out with an example event, marked X-Kanbu-Test: true.")
def test_webhook() -> None:
    send_example()


# By its name pytest would take it for a test.
test_webhook.__test__ = False  # type: ignore[attr-defined]
