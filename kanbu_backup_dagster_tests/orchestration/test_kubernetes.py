"""A run as a Kubernetes job: what the launcher asks for, and that its command runs; all but the cluster is real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster_k8s.launcher
import kubernetes_validate
import pytest
from dagster import DagsterRunStatus
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.launcher import LaunchRunContext
from dagster_k8s import K8sRunLauncher
from kubernetes.client import ApiClient

from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

PROJECT = Path(__file__).parents[2]
CONFIG = PROJECT / "deploy" / "kubernetes" / "dagster.yaml"


def test_a_run_is_a_job_whose_command_runs_without_the_cluster(
    newest_postgres: PostgresForTest,
    configure: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    store = configure(DAGSTER_POSTGRES_URL=newest_postgres.tcp_url(newest_postgres.database()))
    FolderStorage(store).prepare()
    shutil.copy(CONFIG, Path(os.environ["DAGSTER_HOME"], "dagster.yaml"))
    asked_for: list[Any] = []
    monkeypatch.setattr(dagster_k8s.launcher, "load_kubernetes_config", lambda **where: None)
    monkeypatch.setattr(
        dagster_k8s.launcher.DagsterKubernetesClient,
        "create_namespaced_job_with_retries",
        lambda self, body, namespace: asked_for.append((body, namespace)),
    )
    job = ReconstructableRepository.for_module("kanbu_backup_dagster.definitions", "defs").get_reconstructable_job(
        "rotate_keys"
    )
    with open_instance() as instance:
        assert isinstance(instance.run_launcher, K8sRunLauncher)
        assert instance.run_monitoring_max_resume_run_attempts == 0
        run = instance.create_run_for_job(
            job.get_definition(), status=DagsterRunStatus.STARTING, job_code_origin=job.get_python_origin()
        )
        instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    ((body, namespace),) = asked_for
    manifest = ApiClient().sanitize_for_serialization(body)
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert namespace == "kanbu-backup"
    assert pod["serviceAccountName"] == "kanbu-backup-runs"
    assert not pod["automountServiceAccountToken"]
    assert pod["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert manifest["spec"]["backoffLimit"] == 0
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/data/backups", "/tmp"}
    assert "command" not in container, "the image's entrypoint stays"
    assert newest_postgres.password not in json.dumps(manifest)

    # The pod: a home without a configuration, no cluster to be asked, and the environment.
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "DAGSTER_HOME": str(tmp_path)}
    assert container["args"][0] == "dagster"
    subprocess.run(
        [sys.executable, "-m", *container["args"]], env=environment, check=True, capture_output=True, timeout=120
    )
    with open_instance() as instance:
        finished = instance.get_run_by_id(run.run_id)
    assert finished is not None
    assert finished.status is DagsterRunStatus.SUCCESS
