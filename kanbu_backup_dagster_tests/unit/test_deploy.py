"""deploy/: read by the tools that use it, and true of the settings, the image and the schedule file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster._config import process_config
from dagster._config.field import resolve_to_config_type
from dagster._core.instance.config import dagster_instance_config_schema
from dagster_k8s import K8sRunLauncher

from kanbu_backup_dagster.schedule_file import load_schedule_file
from kanbu_backup_dagster.settings import Settings, is_secret, load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
PACKAGED = DEPLOY.parent / "kanbu_backup_dagster" / "dagster.yaml"
OF_COMPOSE = {"RECORDS_PASSWORD", "BACKUP_FOLDER", "SOURCE_FOLDER", "SCHEDULE_FILE", "KANBU_NETWORK"}
OF_UVICORN = {"FORWARDED_ALLOW_IPS"}


def tool(name: str) -> str:
    """A program that came as a wheel of the extra `dev`."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None, f"{name} is not installed: pip install -e .[dev]"
    return found


def accepted(*command: str | Path, cwd: Path = DEPLOY) -> str:
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def documents(name: str) -> list[dict[str, Any]]:
    return [part for part in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text("utf-8")) if part]


MANIFESTS = sorted(
    path.name
    for path in (DEPLOY / "kubernetes").glob("*.yaml")
    if path.name not in ("kustomization.yaml", "dagster.yaml", "kanbu_backup.yaml")
)


# --- settings -------------------------------------------------------------------------------------------------------


def test_the_example_has_every_variable_with_its_meaning_and_default() -> None:
    text = (DEPLOY / ".env.example").read_text("utf-8")
    blocks = re.findall(r"^# (.+)\n(#?)([A-Z_]+)=(.*)$", text, re.MULTILINE)
    told = {name: (meaning, bool(off), value) for meaning, off, name, value in blocks}
    assert len(told) == len(blocks) == len(re.findall(r"^#?[A-Z_]+=", text, re.MULTILINE))
    settings = {str(field.alias): field for field in Settings.model_fields.values()}
    assert set(told) == {*settings, *OF_COMPOSE, *OF_UVICORN}
    for name, field in settings.items():
        meaning, off, value = told[name]
        assert meaning.startswith(str(field.description)), name
        default = field.default.value if isinstance(field.default, Enum) else field.default
        if off:
            assert value == ("" if default is None else str(default)), name


def test_the_example_can_be_read(tmp_path: Path) -> None:
    text = (DEPLOY / ".env.example").read_text("utf-8")
    everything = tmp_path / ".env"
    everything.write_text(re.sub(r"^#(?=[A-Z_]+=)", "", text, flags=re.MULTILINE))
    assert load_settings(everything) == load_settings(tmp_path / "none").model_copy(
        update={"database_url": load_settings(everything).database_url}
    )


# --- compose --------------------------------------------------------------------------------------------------------


@pytest.fixture
def composed(tmp_path: Path) -> dict[str, Any]:
    """The compose file as Docker Compose understands it, with the example's settings."""
    for name in ("docker-compose.yml", "Dockerfile"):
        shutil.copy(DEPLOY / name, tmp_path / name)
    example = (DEPLOY / ".env.example").read_text("utf-8")
    for name in ("RECORDS_PASSWORD", "BACKUP_UI_PASSWORD", "BACKUP_ENCRYPTION_KEY"):
        example = example.replace(f"\n{name}=\n", f"\n{name}={name.lower()}\n")
    (tmp_path / ".env").write_text(example)
    read: dict[str, Any] = yaml.safe_load(accepted(tool("docker-compose"), "config", cwd=tmp_path))
    return read


def test_compose_refuses_to_start_without_passwords(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "docker-compose.yml", tmp_path)
    (tmp_path / ".env").write_text("")
    ran = subprocess.run([tool("docker-compose"), "config"], cwd=tmp_path, capture_output=True, text=True, check=False)
    # The wheel's program exits with 0 whatever happens.
    assert ran.stdout == ""
    assert "set it in .env" in ran.stderr


def test_only_the_web_port_is_published_and_to_this_machine(composed: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in composed["services"].items()}
    assert [(port["host_ip"], port["target"]) for port in ports.pop("web")] == [("127.0.0.1", 3000)]
    assert not any(ports.values())
    assert composed["networks"]["records"]["internal"]
    assert set(composed["services"]["records"]["networks"]) == {"records"}


def test_the_web_server_gets_no_secret_of_the_backups(composed: dict[str, Any]) -> None:
    web, daemon = (composed["services"][name]["environment"] for name in ("web", "daemon"))
    secrets = {str(Settings.model_fields[name].alias) for name in Settings.model_fields if is_secret(name)}
    assert secrets & set(web) == {"BACKUP_UI_PASSWORD", "BACKUP_TRIGGER_API_KEY", "DAGSTER_POSTGRES_URL"}
    assert {"DATABASE_URL", "BACKUP_ENCRYPTION_KEY"} <= set(daemon)
    for shared in ("DAGSTER_POSTGRES_URL", "BACKUP_SCHEDULER_MODE", "BACKUP_CRON_TIMEZONE"):
        assert web[shared] == daemon[shared]


def test_containers_can_write_to_their_volumes_only(composed: dict[str, Any]) -> None:
    for name in ("web", "daemon"):
        service = composed["services"][name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["stop_grace_period"] == "1m0s"
        assert service["depends_on"]["records"]["condition"] == "service_healthy"


# --- Dockerfile -----------------------------------------------------------------------------------------------------


def test_the_dockerfile_has_nothing_to_be_said_against() -> None:
    accepted(tool("hadolint"), "--config", "hadolint.yaml", "Dockerfile")


def test_the_image_runs_as_the_user_of_the_users_guide() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    assert "USER 1000:1000" in text
    # Kubernetes puts a run's command in place of CMD: what is fixed must not be our own command.
    assert 'ENTRYPOINT ["tini", "--"]' in text
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for name in copied.split():
            assert (DEPLOY.parent / name).exists()
            assert f"!{name}" in (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").split("\n")


# --- Kubernetes -----------------------------------------------------------------------------------------------------


def test_every_manifest_is_in_the_kustomization() -> None:
    (kustomization,) = documents("kustomization.yaml")
    assert {*kustomization["resources"], "secret.example.yaml"} == {*MANIFESTS, "secret.yaml"}


def test_manifests_fit_kubernetes_schemas() -> None:
    accepted(tool("kubernetes-validate"), "--strict", *MANIFESTS, cwd=DEPLOY / "kubernetes")
    kinds = {part["kind"] for name in MANIFESTS for part in documents(name)}
    assert {"Deployment", "Service", "Secret", "PersistentVolumeClaim", "NetworkPolicy", "Role"} <= kinds


def test_names_that_manifests_call_one_another_by_exist() -> None:
    made = {(part["kind"], part["metadata"]["name"]) for name in MANIFESTS for part in documents(name)}
    (kustomization,) = documents("kustomization.yaml")
    made |= {("ConfigMap", entry["name"]) for entry in kustomization["configMapGenerator"]}
    (instance,) = documents("dagster.yaml")
    launcher = instance["run_launcher"]["config"]
    used = {("ServiceAccount", launcher["service_account_name"]), ("ConfigMap", launcher["instance_config_map"])}
    used |= {("Secret", name) for name in launcher["env_secrets"]}
    used |= {("ConfigMap", name) for name in launcher["env_config_maps"]}
    pods = [part["spec"]["template"]["spec"] for name in ("web.yaml", "daemon.yaml") for part in documents(name)[:1]]
    for volumes in (launcher["volumes"], *(pod["volumes"] for pod in pods)):
        used |= {("ConfigMap", volume["configMap"]["name"]) for volume in volumes if "configMap" in volume}
        used |= {
            ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
            for volume in volumes
            if "persistentVolumeClaim" in volume
        }
    for pod in pods:
        used.add(("ServiceAccount", pod["serviceAccountName"]))
        for source in pod["containers"][0]["envFrom"]:
            kind, reference = next(iter(source.items()))
            used.add(({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], reference["name"]))
    assert used <= made
    image, tag = launcher["job_image"].split(":")
    assert (image, tag) == (kustomization["images"][0]["newName"], kustomization["images"][0]["newTag"])


def test_secrets_are_where_they_are_needed() -> None:
    known = {str(field.alias) for field in Settings.model_fields.values()}
    given = {part["metadata"]["name"]: set(part["stringData"]) for part in documents("secret.example.yaml")}
    assert set.union(*given.values()) <= known
    assert given["kanbu-backup-web"].isdisjoint({"DATABASE_URL", "BACKUP_ENCRYPTION_KEY"})
    (web, _), (instance,) = documents("web.yaml"), documents("dagster.yaml")
    of_web = [
        entry.get("secretRef", {}).get("name") for entry in web["spec"]["template"]["spec"]["containers"][0]["envFrom"]
    ]
    assert "kanbu-backup" not in of_web
    assert "kanbu-backup-web" not in instance["run_launcher"]["config"]["env_secrets"]


def test_dagster_accepts_the_instance() -> None:
    (instance,), packaged = documents("dagster.yaml"), yaml.safe_load(PACKAGED.read_text("utf-8"))
    checked = process_config(dagster_instance_config_schema(), instance)
    assert checked.success, checked.errors
    launcher = process_config(resolve_to_config_type(K8sRunLauncher.config_type()), instance["run_launcher"]["config"])
    assert launcher.success, launcher.errors
    for same in ("storage", "local_artifact_storage", "telemetry", "concurrency", "run_queue", "retention"):
        assert instance[same] == packaged[same], same


def test_the_schedule_file_is_right() -> None:
    loaded = load_schedule_file(DEPLOY / "kubernetes" / "kanbu_backup.yaml")
    assert not loaded.problems
    assert loaded.schedules


# --- the package ----------------------------------------------------------------------------------------------------


def test_what_is_not_python_is_installed_too() -> None:
    """An editable installation, as tests have it, would not miss it."""
    declared = re.findall(
        r"^kanbu_backup_dagster = \[(.*)\]$", (DEPLOY.parent / "pyproject.toml").read_text(), re.MULTILINE
    )
    others = [path for path in PACKAGED.parent.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sorted(re.findall(r'"([^"]+)"', declared[0])) == sorted(
        str(path.relative_to(PACKAGED.parent)) for path in others
    )
