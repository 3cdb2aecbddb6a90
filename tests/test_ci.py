"""What users put into their CI: the action's steps are run, and every command is accepted."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import cli
from bench.limits import Limits
from compress.config import load_config
from compress.files.documents import tomllib, validated

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
ACTION_FILE = ROOT / "action.yml"
EXAMPLE_FILE = ROOT / ".github" / "workflows" / "quality-gate.yml"
ACTION: dict[str, Any] = yaml.safe_load(ACTION_FILE.read_text(encoding="utf-8"))
EXAMPLE: dict[Any, Any] = yaml.safe_load(EXAMPLE_FILE.read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
EXAMPLE_STEPS: list[dict[str, Any]] = EXAMPLE["jobs"]["gate"]["steps"]

# https://docs.github.com/en/actions/reference/workflows-and-actions/metadata-syntax
ACTION_KEYS = {"name", "author", "description", "inputs", "outputs", "runs", "branding"}
STEP_KEYS = {"name", "id", "if", "env", "continue-on-error"}
RUN_KEYS = {"run", "shell", "working-directory"}
USES_KEYS = {"uses", "with"}
OUTPUTS_OF_OTHERS = {"actions/cache/restore": {"cache-hit"}}

VERDICTS = {0: "PASS", 3: "FAIL", 4: "INCONCLUSIVE", 5: "SKIPPED"}
REPORT_FILES = {"report.json", "report.md", "report.html", "report.xml"}
SUMMARY_LIMIT = 1024 * 1000

COMPRESS = r"""#!/bin/bash
number=$(ls "$CALLS" | wc -l)
printf '%s\0' "$@" >"$CALLS/$(printf %03d "$number")"
command=$1 output=
while (($#)); do
  if [[ $1 == --output ]]; then output=$2; fi
  shift
done
case $command in
  --version) echo "compress ${TOOL_VERSION:-1}" ;;
  prune)
    if ((${PRUNE_CODE:-0})); then echo "error: refused" >&2 && exit "$PRUNE_CODE"; fi
    mkdir -p "$output"
    echo "pruned by call $number" | tee "$output/config.toml" >"$output/pruned.safetensors" ;;
  bench)
    if [[ ! ${NO_REPORT:-} ]]; then
      mkdir -p "$output"
      for name in report.json report.html report.xml; do echo "$name" >"$output/$name"; done
      printf '%s\n' "${MARKDOWN:-# measured}" >"$output/report.md"
      if [[ ${LONG_MARKDOWN:-} ]]; then cat "$LONG_MARKDOWN" >>"$output/report.md"; fi
    fi
    exit "${BENCH_CODE:-0}" ;;
esac
"""
PYTHON = r"""#!/bin/bash
case "$*" in
  "-m pip cache dir") echo "$HOME/pip cache" ;;
  --version) echo "Python 3.12.0" ;;
  "-m pip install"*)
    mkdir -p "$HOME/pip cache" && echo wheel >"$HOME/pip cache/wheel"
    printf '%s\0' "$@" >"$HOME/installed" ;;
  *) exit 9 ;;
esac
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table whose header begins with a word."""
    table = PAGE.split(f"\n| {heading} |")[1].split("\n\n")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def accepted(arguments: list[str]) -> dict[str, Any]:
    """Parse a command line as the tool does; raises if it would be refused."""
    name, *rest = arguments
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    return group.commands[name].make_context(name, rest).params


def script_lines() -> Iterator[str]:
    """Yield every line of the page, the example and the action that may hold a command."""
    gitlab = yaml.safe_load(blocks("yaml")[1])
    for block in blocks("sh"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from (line for job in ("prune", "gate") for line in gitlab[job]["script"])
    yield from (line for step in EXAMPLE_STEPS for line in step.get("run", "").splitlines())
    yield from re.findall(r"`(compress \w+ [^-`][^`]*)`", PAGE)


def commands() -> list[str]:
    """Return every call of the tool on these lines, without what the shell makes of its status."""
    found = [
        part.strip()
        for line in script_lines()
        for part in re.split(r"\|\||&&|;|(?<=\s)#", line)
        if part.strip().startswith("compress ")
    ]
    return list(dict.fromkeys(found))


# A runner


@dataclass
class Runner:
    """As much of GitHub's runner as the action needs; caches outlive its jobs."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.workspace, self.temp = self.home / "work space", self.home / "temp"
        self.caches, self.action = self.home / "caches", self.home / "_actions" / "the action"
        for folder in (self.workspace, self.temp, self.caches, self.home / "bin"):
            folder.mkdir(parents=True)
        for name in ("compress/pruning/pruner.py", "configs/default.toml", "pyproject.toml"):
            (self.action / name).parent.mkdir(parents=True, exist_ok=True)
            (self.action / name).write_text(name)
        for name, script in (("compress", COMPRESS), ("python", PYTHON)):
            program = self.home / "bin" / name
            program.write_text(script)
            program.chmod(0o755)

    def write(self, name: str, text: str) -> Path:
        path = self.workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(self, **inputs: str) -> Job:
        """Run the action; ``python_version`` stands for ``python-version``."""
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        assert given.keys() <= ACTION["inputs"].keys()
        defaults = {name: about["default"] for name, about in ACTION["inputs"].items()}
        job = Job(self, {**defaults, **given})
        for step in STEPS:
            job.take(step)
        return job


@dataclass
class Job:
    """One job whose only step is the action."""

    runner: Runner
    inputs: dict[str, str]
    steps: dict[str, dict[str, str]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    artefacts: dict[str, set[str]] = field(default_factory=dict)
    summary: bytes = b""
    log: str = ""

    def __post_init__(self) -> None:
        jobs = len(list(self.runner.home.glob("calls of *")))
        self.calls_folder = self.runner.home / f"calls of {jobs}"
        self.calls_folder.mkdir()

    @property
    def calls(self) -> list[list[str]]:
        """What the tool was called with, but for its version."""
        read = [path.read_text().split("\0")[:-1] for path in sorted(self.calls_folder.iterdir())]
        return [call for call in read if call != ["--version"]]

    @property
    def commands(self) -> list[str]:
        return [call[0] for call in self.calls]

    @property
    def outputs(self) -> dict[str, str]:
        return {name: self.filled(out["value"]) for name, out in ACTION["outputs"].items()}

    @property
    def code(self) -> int:
        return self.codes[-1] if self.codes else 0

    def take(self, step: dict[str, Any]) -> None:
        condition = step.get("if", "success()")
        if "always()" not in condition:
            condition = f"success() && ({condition})"
        if not self.value(condition):
            return
        self.ran.append(step["name"])
        found = self.script(step) if "run" in step else self.other(step)
        if "id" in step:
            self.steps[step["id"]] = found

    def value(self, expression: str) -> Any:
        """Evaluate an expression; anything this does not know is an error."""
        words = {"&&": "and", "||": "or", "always()": "True", "success()": str(not self.codes)}
        token = re.compile(r"'[^']*'|==|!=|&&|\|\||[()]|[\w.-]+(?:\(\))?")
        assert not token.sub("", expression).strip(), expression
        parts = [
            words.get(part)
            or (part if part[0] in "'=!()" else repr(self.look_up(*part.split("."))))
            for part in token.findall(expression)
        ]
        return eval(" ".join(parts), {"__builtins__": {}})

    def look_up(self, context: str, name: str, *rest: str) -> str:
        if context == "inputs":
            return self.inputs[name]
        if context == "steps":
            kind, output = rest
            assert kind == "outputs"
            return self.steps.get(name, {}).get(output, "")
        assert context == "runner"
        return {"os": "Linux", "arch": "X64"}[name]

    def filled(self, text: str) -> str:
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: str(self.value(found[1])), text)

    def script(self, step: dict[str, Any]) -> dict[str, str]:
        """Run a script as ``shell: bash`` does, and return its outputs."""
        assert step["shell"] == "bash"
        runner = self.runner
        output, summary = runner.temp / "output", runner.temp / "summary"
        for file in (output, summary):
            file.write_text("")
        script = runner.temp / "script.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=runner.workspace,
            env={
                "PATH": f"{runner.home / 'bin'}:{os.defpath}",
                "HOME": str(runner.home),
                "CALLS": str(self.calls_folder),
                "GITHUB_ACTION_PATH": str(runner.action),
                "RUNNER_TEMP": str(runner.temp),
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(summary),
                **runner.env,
                **{name: self.filled(text) for name, text in step.get("env", {}).items()},
            },
            capture_output=True,
            text=True,
        )
        self.log += done.stdout + done.stderr
        self.summary += summary.read_bytes()
        if done.returncode:
            self.codes.append(done.returncode)
        return dict(line.split("=", 1) for line in output.read_text().splitlines())

    def other(self, step: dict[str, Any]) -> dict[str, str]:
        """Do what another action would do."""
        name = step["uses"].partition("@")[0]
        given = {key: self.filled(value) for key, value in step["with"].items()}
        if name == "actions/setup-python":
            return {}
        path = self.runner.workspace / given["path"]
        if name == "actions/upload-artifact":
            if path.is_dir():
                self.artefacts[given["name"]] = {file.name for file in path.iterdir()}
            return {}
        entry = self.runner.caches / given["key"]
        if name == "actions/cache/save":
            shutil.copytree(path, entry)
            return {}
        assert name == "actions/cache/restore"
        if not entry.is_dir():
            return {}
        shutil.copytree(entry, path, dirs_exist_ok=True)
        return {"cache-hit": "true"}


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.fixture
def pruner(runner: Runner) -> dict[str, str]:
    """Inputs of a job that prunes, and the files that they name."""
    runner.write("dense.pth", "weights")
    runner.write("prune.toml", "[prune]")
    runner.write("edge.toml", "opset = 17")
    runner.write("data/train/cat/1.jpg", "image")
    return {
        "checkpoint": "dense.pth",
        "config": "prune.toml",
        "target": "edge.toml",
        "data": "data",
        "budget": "macs=0.5",
    }


# What the files say


def test_the_action_has_only_keys_that_github_knows() -> None:
    assert ACTION.keys() <= ACTION_KEYS
    assert ACTION["runs"].keys() == {"using", "steps"}
    assert ACTION["runs"]["using"] == "composite"
    for about in ACTION["inputs"].values():
        assert about.keys() - {"deprecationMessage"} == {"description", "default"}
        assert isinstance(about["default"], str)
    for about in ACTION["outputs"].values():
        assert about.keys() == {"description", "value"}
    for step in STEPS:
        kind = RUN_KEYS if "run" in step else USES_KEYS
        assert step.keys() <= STEP_KEYS | kind, step["name"]
        assert ("shell" in step) == ("run" in step), step["name"]
        assert ("uses" in step) != ("run" in step), step["name"]


def test_every_input_is_used_and_every_used_one_is_declared() -> None:
    used = set(re.findall(r"\binputs\.([\w-]+)", ACTION_FILE.read_text(encoding="utf-8")))
    assert used == ACTION["inputs"].keys()


@pytest.mark.parametrize(
    ("steps", "outputs"),
    [(STEPS, ACTION["outputs"]), (EXAMPLE_STEPS, EXAMPLE["jobs"]["gate"]["outputs"])],
    ids=["action", "example"],
)
def test_outputs_of_steps_are_read_after_a_step_that_writes_them(
    steps: list[dict[str, Any]], outputs: dict[str, Any]
) -> None:
    written: dict[str, set[str]] = {}
    for step in [*steps, outputs]:
        for name, output in re.findall(r"\bsteps\.([\w-]+)\.outputs\.([\w-]+)", str(step)):
            assert output in written[name], (name, output)
        if "id" in step:
            action = step.get("uses", "").partition("@")[0]
            own = set(re.findall(r'echo "([\w-]+)=', step.get("run", "")))
            local = set(ACTION["outputs"]) if action.startswith("./") else set()
            written[step["id"]] = own | local | OUTPUTS_OF_OTHERS.get(action, set())


def test_other_actions_are_pinned_by_commit_and_everywhere_by_the_same() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    pages = [ACTION_FILE, *workflows, ROOT / "docs" / "ci.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"^ *-? uses: (.+)$", text, re.MULTILINE)
    foreign = {use for use in found if not use.startswith(("./", "OWNER/REPOSITORY"))}
    assert {use.split("/")[0] for use in foreign} == {"actions"}
    pins: dict[str, set[str]] = {}
    for use in foreign:
        pinned = re.fullmatch(r"(\w+/[\w-]+)[\w/-]*@([0-9a-f]{40} # v\d+\.\d+\.\d+)", use)
        assert pinned, use
        pins.setdefault(pinned[1], set()).add(pinned[2])
    assert all(len(commits) == 1 for commits in pins.values()), pins


@pytest.mark.parametrize("step", [*STEPS, *EXAMPLE_STEPS], ids=lambda step: step.get("name", ""))
def test_no_expression_is_part_of_a_script(step: dict[str, Any]) -> None:
    assert "${{" not in step.get("run", "")
    if "run" in step and step in STEPS:
        assert step["run"].startswith("set -euo pipefail\n")


def test_the_example_starts_by_hand_or_by_call_alone() -> None:
    triggers = EXAMPLE[True]  # YAML 1.1 reads `on` so
    assert triggers.keys() == {"workflow_dispatch", "workflow_call"}
    assert EXAMPLE["permissions"] == {"contents": "read"}
    called = triggers["workflow_call"]["inputs"]
    assert triggers["workflow_dispatch"]["inputs"] == called
    used = set(re.findall(r"\binputs\.([\w-]+)", str(EXAMPLE["jobs"])))
    assert used == called.keys()
    assert all(about["type"] == "string" and "default" in about for about in called.values())
    (gate,) = (step for step in EXAMPLE_STEPS if step.get("id") == "gate")
    assert gate["with"].keys() <= ACTION["inputs"].keys()


def test_the_example_prunes_what_it_trained() -> None:
    (train,) = (call for call in commands() if call.startswith("compress train"))
    options = accepted(shlex.split(train)[1:])
    load_config(options["config"])
    gate = EXAMPLE_STEPS[-1]
    assert f"'{options['output']}/dense.safetensors'" in gate["with"]["checkpoint"]
    assert options["config"] in ACTION["inputs"]["config"]["description"]


# What the page says


def test_the_page_lists_every_input_and_output() -> None:
    named = {
        name: row[1].strip("`")
        for row in rows("input")
        for name in re.findall(r"`([\w-]+)`", row[0])
    }
    assert named.keys() == ACTION["inputs"].keys()
    in_words = {"as configured", "digits-resnet20", "this tool"}
    for name, default in named.items():
        assert ACTION["inputs"][name]["default"] == ("" if default in in_words else default), name
    assert {row[0].strip("`") for row in rows("output")} == ACTION["outputs"].keys()


def test_exit_codes_are_those_of_the_tool() -> None:
    listed = [row[0].split(", ") for row in rows("code")]
    codes = {int(code) for row in listed for code in row}
    assert codes | {130} == {int(code) for code in re.findall(r"\b\d+\b", cli.EXIT_CODES)}
    for code, verdict in VERDICTS.items():
        (row,) = (row for row in rows("code") if row[0] == str(code))
        assert verdict in row[1] or code == 0


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command: str) -> None:
    accepted(shlex.split(command)[1:])


def test_every_command_of_a_job_is_shown() -> None:
    shown = {shlex.split(command)[1] for command in commands()}
    assert shown == {
        "prune",
        "train",
        "export",
        "bench",
        "gate",
        "report",
        "baseline",
        "doctor",
    } - {"doctor"}


def test_the_limits_are_valid() -> None:
    (text,) = blocks("toml")
    limits = validated(Limits, tomllib.loads(text), source="docs/ci.md")
    assert limits.latency.max_regression is not None


def test_the_github_examples_name_inputs_and_outputs_that_exist() -> None:
    whole, _, *rest = blocks("yaml")
    jobs = yaml.safe_load(whole)["jobs"]
    steps = [step for block in rest for step in yaml.safe_load(block)]
    for step in [*jobs["gate"]["steps"], *steps]:
        if step.get("uses", "").startswith("OWNER/"):
            assert step["with"].keys() <= ACTION["inputs"].keys()
    assert set(re.findall(r"outputs\.([\w-]+)", PAGE)) <= ACTION["outputs"].keys()


def test_gitlab_keeps_the_report_and_caches_the_pruned_network() -> None:
    document = yaml.safe_load(blocks("yaml")[1])
    jobs = {name: job for name, job in document.items() if isinstance(job, dict) and "stage" in job}
    assert [job["stage"] for job in jobs.values()] == document["stages"]
    kept = jobs["gate"]["artifacts"]
    assert kept["when"] == "always"
    assert kept["paths"] == ["report/"]
    assert kept["reports"] == {"junit": "report/report.xml"}
    bench = accepted(shlex.split(jobs["gate"]["script"][-1])[1:])
    assert f"{bench['output']}/" in kept["paths"]
    (cache,) = (entry for entry in jobs["prune"]["cache"] if "files" in entry["key"])
    prune = accepted(shlex.split(jobs["prune"]["script"][-1].split(" || ")[1])[1:])
    assert set(cache["key"]["files"]) == {prune["config"], str(prune["checkpoint"])}
    assert "$BUDGET" in cache["key"]["prefix"]
    assert cache["paths"] == [f"{prune['output']}/"] == jobs["prune"]["artifacts"]["paths"]
    assert jobs["gate"]["needs"] == ["prune"]
    assert set(jobs["gate"]["retry"]["exit_codes"]) <= {4, 5}
    assert set(jobs["gate"]["allow_failure"]["exit_codes"]) <= {4}


def shell(runner: Runner, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run lines as a CI's shell does."""
    (runner.home / "calls").mkdir(exist_ok=True)
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=runner.workspace,
        env={
            "PATH": f"{runner.home / 'bin'}:{os.defpath}",
            "CALLS": str(runner.home / "calls"),
            **env,
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("code", VERDICTS)
def test_the_plain_script_prints_the_report_and_ends_with_the_verdict(
    runner: Runner, code: int
) -> None:
    done = shell(runner, blocks("sh")[0], BENCH_CODE=str(code), MARKDOWN="# the report")
    assert done.returncode == code
    assert "# the report" in done.stdout


def test_the_plain_script_needs_no_report(runner: Runner) -> None:
    done = shell(runner, blocks("sh")[0], BENCH_CODE="1", NO_REPORT="yes")
    assert done.returncode == 1
    assert not done.stderr


def test_the_gitlab_jobs_prune_once_and_end_with_the_verdict(runner: Runner) -> None:
    document = yaml.safe_load(blocks("yaml")[1])
    for _ in range(2):
        assert shell(runner, "\n".join(document["prune"]["script"])).returncode == 0
    done = shell(runner, "\n".join(document["gate"]["script"]), BENCH_CODE="3")
    assert done.returncode == 3
    calls = sorted((runner.home / "calls").iterdir())
    assert [call.read_text().split("\0")[0] for call in calls] == ["prune", "export", "bench"]
    after = shell(runner, "\n".join(document["gate"]["after_script"]))
    assert after.stdout == "# measured\n"


@pytest.mark.parametrize(
    ("verdict", "fails"),
    [("PASS", False), ("INCONCLUSIVE", False), ("FAIL", True), ("SKIPPED", True), ("ERROR", True)],
)
def test_a_github_job_can_go_on_where_the_measurement_cannot_tell(
    runner: Runner, verdict: str, fails: bool
) -> None:
    gate, after = yaml.safe_load(blocks("yaml")[2])
    job = Job(runner, {}, steps={gate["id"]: {"verdict": verdict}})
    assert job.value(after["if"]) is fails


# What the action does


@pytest.mark.parametrize(("code", "verdict"), VERDICTS.items())
def test_the_verdict_is_told_shown_kept_and_the_exit_code(
    runner: Runner, code: int, verdict: str
) -> None:
    runner.env = {"BENCH_CODE": str(code), "MARKDOWN": "# resnet20 `$(date)` for cpu"}
    (runner.workspace / "my run").mkdir()
    job = runner.run(run="my run", output="the report", artifact="kept")
    assert job.code == code
    assert job.outputs == {
        "verdict": verdict,
        "exit-code": str(code),
        "report": "the report/report.json",
    }
    first, *rest = job.summary.decode().splitlines()
    assert verdict in first
    assert "# resnet20 `$(date)` for cpu" in rest
    assert job.artefacts == {"kept": REPORT_FILES}
    assert (f"::error title=Quality gate: {verdict}::" in job.log) == (code != 0)
    assert job.commands == ["export", "bench"]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 5, 6])
def test_without_a_report_nothing_passes_and_an_old_one_is_not_shown(
    runner: Runner, code: int
) -> None:
    runner.env = {"BENCH_CODE": str(code), "NO_REPORT": "yes"}
    (runner.workspace / "run").mkdir()
    for name in REPORT_FILES:
        runner.write(f"compress-report/{name}", "old")
    job = runner.run(run="run")
    assert job.code == (code or 1)
    assert job.outputs == {"verdict": "ERROR", "exit-code": str(code or 1), "report": ""}
    assert "old" not in job.summary.decode()
    assert "There is no report" in job.summary.decode()
    assert job.artefacts == {"compress-report": set()}


@pytest.mark.parametrize("code", [1, 2, 6])
def test_an_error_after_the_report_is_no_verdict(runner: Runner, code: int) -> None:
    runner.env = {"BENCH_CODE": str(code)}
    (runner.workspace / "run").mkdir()
    job = runner.run(run="run")
    assert (job.code, job.outputs["verdict"]) == (code, "ERROR")


def test_inputs_reach_the_tool_whole_and_are_never_run(runner: Runner) -> None:
    nasty = """a "b" 'c' $(touch owned) `touch owned`; touch owned # \\ *"""
    runner.write("dense.pth", "weights")
    runner.write(f"{nasty}/image", "")
    job = runner.run(
        checkpoint="dense.pth",
        run="my run",
        config=nasty,
        data=nasty,
        model=nasty,
        budget=nasty,
        settings=f"seed={nasty}\n\nbench.max_seconds=1",
        target=nasty,
        precision=nasty,
        runtime=nasty,
        batch=nasty,
        engine="true",
        limits=nasty,
        baseline=nasty,
        install=f"{nasty}\nsecond",
    )
    assert job.code == 0, job.log
    assert not list(runner.home.rglob("owned"))
    prune, export, bench = (accepted(call) for call in job.calls)
    for found in (prune, export, bench):
        assert found["settings"] == [f"seed={nasty}", "bench.max_seconds=1"]
        assert (found["model"], found["precision"]) == (nasty, nasty)
        assert found["data"] == Path(nasty)
    assert prune["checkpoint"] == Path("dense.pth")
    assert prune["output"] == export["run"] == bench["run"] == Path("my run")
    assert (prune["config"], prune["budget"], prune["target"]) == (nasty, nasty, nasty)
    assert (export["target"], export["batch"], export["engine"]) == (nasty, nasty, True)
    assert (bench["runtime"], bench["batch"], bench["limits"]) == (nasty, nasty, nasty)
    assert (bench["baseline"], bench["output"]) == (Path(nasty), Path("compress-report"))
    installed = (runner.home / "installed").read_text().split("\0")
    assert installed[:-1] == ["-m", "pip", "install", "--", nasty, "second"]


def test_what_is_left_empty_is_left_to_the_tool(runner: Runner, pruner: dict[str, str]) -> None:
    job = runner.run(checkpoint=pruner["checkpoint"])
    assert job.calls == [
        ["prune", "--checkpoint", "dense.pth", "--output", "compress-run"],
        ["export", "--", "compress-run"],
        ["bench", "--limits", "default", "--output", "compress-report", "--", "compress-run"],
    ]


@pytest.mark.parametrize(
    ("inputs", "judged_by"),
    [
        ({}, "default"),
        ({"limits": "", "budgets": ""}, "default"),
        ({"budgets": "old.toml"}, "old.toml"),
        ({"limits": "new.toml", "budgets": "old.toml"}, "new.toml"),
    ],
)
def test_limits_may_still_be_named_as_before(
    runner: Runner, inputs: dict[str, str], judged_by: str
) -> None:
    (runner.workspace / "run").mkdir()
    assert accepted(runner.run(run="run", **inputs).calls[-1])["limits"] == judged_by
    assert "limits" in ACTION["inputs"]["budgets"]["deprecationMessage"]


def test_a_run_that_begins_with_a_dash_is_no_option(runner: Runner) -> None:
    (runner.workspace / "--help").mkdir()
    job = runner.run(run="--help")
    assert [accepted(call)["run"] for call in job.calls] == [Path("--help")] * 2


def test_batch_sizes_are_those_of_engines_only_where_engines_are_built(runner: Runner) -> None:
    (runner.workspace / "run").mkdir()
    export, bench = runner.run(run="run", batch="1,8").calls
    assert "--batch" not in export
    assert accepted(bench)["batch"] == "1,8"
    export, _ = runner.run(run="run", batch="1,8", engine="true").calls
    assert (accepted(export)["batch"], accepted(export)["engine"]) == ("1,8", True)


def test_pruning_is_kept_even_if_the_gate_fails(runner: Runner, pruner: dict[str, str]) -> None:
    runner.env = {"BENCH_CODE": "3"}
    first = runner.run(**pruner)
    assert first.code == 3
    shutil.rmtree(runner.workspace / "compress-run")
    second = runner.run(**pruner)
    assert first.commands == ["prune", "export", "bench"]
    assert second.commands == ["export", "bench"]
    assert (runner.workspace / "compress-run" / "pruned.safetensors").is_file()


CHANGES = {
    "weights": lambda runner, inputs: runner.write("dense.pth", "others"),
    "configuration": lambda runner, inputs: runner.write("prune.toml", "[prune] # longer"),
    "target": lambda runner, inputs: runner.write("edge.toml", "opset = 20"),
    "another image": lambda runner, inputs: runner.write("data/train/cat/2.jpg", "image"),
    "size of an image": lambda runner, inputs: runner.write("data/train/cat/1.jpg", "larger image"),
    "budget": lambda runner, inputs: inputs.update(budget="macs=0.4"),
    "model": lambda runner, inputs: inputs.update(model="resnet18"),
    "precision": lambda runner, inputs: inputs.update(precision="int8"),
    "setting": lambda runner, inputs: inputs.update(settings="bench.block_ms=1\nprune.steps=3"),
    "version": lambda runner, inputs: runner.env.update(TOOL_VERSION="2"),
    "sources": lambda runner, inputs: (runner.action / "compress/pruning/pruner.py").write_text(
        "new"
    ),
    "defaults": lambda runner, inputs: (runner.action / "configs/default.toml").write_text("new"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_pruned_network_follows_from_prunes_anew(
    runner: Runner, pruner: dict[str, str], change: str
) -> None:
    runner.run(**pruner)
    CHANGES[change](runner, pruner)
    job = runner.run(**pruner)
    assert job.commands == ["prune", "export", "bench"]
    assert accepted(job.calls[0])["overwrite"]  # the run of the job before lies there


@pytest.mark.parametrize(
    "named",
    [
        {"model": "own:build"},
        {"model": "nets.whole:build"},
        {"settings": "seed=1\nmodel.name = nets.whole:build"},
    ],
)
def test_a_network_of_ones_own_is_pruned_anew_when_its_source_changes(
    runner: Runner, pruner: dict[str, str], named: dict[str, str]
) -> None:
    for name in ("own.py", "layers.py", "nets/whole.py", "nets/parts/stem.py", "docs/conf.py"):
        runner.write(name, "first")
    inputs = {**pruner, **named}
    runner.run(**inputs)
    assert runner.run(**inputs).commands == ["export", "bench"]
    read = ["own.py", "layers.py"]  # what lies beside a module may be imported by it
    read += [] if "own" in str(named) else ["nets/whole.py", "nets/parts/stem.py"]
    for name in read:
        runner.write(name, "second")
        assert runner.run(**inputs).commands == ["prune", "export", "bench"], name
        assert runner.run(**inputs).commands == ["export", "bench"], name
    runner.write("docs/conf.py", "second")
    assert runner.run(**inputs).commands == ["export", "bench"]


def test_what_only_measuring_reads_prunes_nothing(runner: Runner, pruner: dict[str, str]) -> None:
    runner.run(**pruner)
    runner.write("limits.toml", "[macs]")
    other = {"batch": "8", "runtime": "torch", "limits": "limits.toml", "baseline": "old.json"}
    job = runner.run(**pruner, **other, settings="bench.max_seconds=9")
    assert job.commands == ["export", "bench"]


def test_a_prune_that_fails_is_not_kept_and_nothing_is_judged(
    runner: Runner, pruner: dict[str, str]
) -> None:
    runner.env = {"PRUNE_CODE": "1"}
    job = runner.run(**pruner)
    assert job.codes == [1]
    assert job.commands == ["prune"]
    assert not list(runner.caches.glob("compress-prune-*"))
    assert "ERROR" in job.summary.decode()
    assert "Keep the report" in job.ran
    assert job.outputs == {"verdict": "ERROR", "exit-code": "", "report": ""}


def test_a_run_that_is_there_is_not_pruned(runner: Runner) -> None:
    runner.write("run/config.toml", "")
    job = runner.run(run="run")
    assert job.commands == ["export", "bench"]
    assert not {"Name what is pruned", "Restore the pruned network", "Prune"} & set(job.ran)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "no run directory 'compress-run'"),
        ({"run": ""}, "must not be empty"),
        ({"run": "here", "output": ""}, "must not be empty"),
        ({"checkpoint": "lost.pth"}, "no checkpoint 'lost.pth'"),
        ({"run": "here", "output": "x\nverdict=PASS"}, "one line each"),
    ],
)
def test_inputs_that_cannot_work_are_refused_before_anything_is_installed(
    runner: Runner, inputs: dict[str, str], said: str
) -> None:
    (runner.workspace / "here").mkdir()
    job = runner.run(**inputs)
    assert job.codes == [2]
    assert re.search(rf"^::error title=compress::.*{said}", job.log, re.MULTILINE)
    assert job.calls == []
    assert "Install" not in job.ran


def test_a_long_report_is_cut_at_a_line_and_the_artefact_named(runner: Runner) -> None:
    line = "| größe | \N{MULTIPLICATION SIGN} 0.49 |\n"
    long = runner.home / "long.md"
    long.write_text(line * 60_000, encoding="utf-8")
    assert long.stat().st_size > SUMMARY_LIMIT
    runner.env = {"LONG_MARKDOWN": str(long)}
    (runner.workspace / "run").mkdir()
    job = runner.run(run="run", artifact="kept")
    assert job.code == 0
    assert 0.9 * SUMMARY_LIMIT < len(job.summary) < SUMMARY_LIMIT
    shown = job.summary.decode().splitlines(keepends=True)
    table = [text for text in shown if text.startswith("|")]
    assert set(table) == {line}
    assert "`kept`" in shown[-1]


def test_a_runner_with_the_tool_installs_nothing(runner: Runner) -> None:
    (runner.workspace / "run").mkdir()
    job = runner.run(run="run", install="none", python_version="")
    assert job.code == 0
    assert not (runner.home / "installed").exists()
    assert not {"Set up Python", "Restore the cache of pip", "Save the cache of pip"} & set(job.ran)


def test_the_tool_is_installed_from_the_action_itself_and_packages_are_cached(
    runner: Runner,
) -> None:
    (runner.workspace / "run").mkdir()
    first, second = runner.run(run="run"), runner.run(run="run")
    installed = (runner.home / "installed").read_text().split("\0")
    assert installed[:-1] == ["-m", "pip", "install", "--", str(runner.action)]
    assert "Set up Python" in first.ran
    assert "Save the cache of pip" in first.ran
    assert "Save the cache of pip" not in second.ran
    third = runner.run(run="run", install="another")
    assert "Save the cache of pip" in third.ran
