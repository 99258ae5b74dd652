"""The command line as a whole: help, version, start, and what the outermost layer promises."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import gauge_ext
from gauge_ext.cli.console import working
from gauge_ext.cli.problems import OptionError, blame, explains_errors
from gauge_ext.errors import AdapterFormatError, ConfigError, GaugeError, WriteError

Run = Callable[..., Result]
COMMANDS = ("demo", "export", "validate", "merge", "inspect", "doctor")


def run_error(error: BaseException) -> Result:
    """Run a command that raises ``error``."""
    app = typer.Typer()

    @app.command()
    @explains_errors
    def command() -> None:
        raise error

    return CliRunner().invoke(app)


def test_help_lists_the_commands(run: Run) -> None:
    for arguments in (("--help",), ("-h",)):
        result = run(*arguments)
        assert result.exit_code == 0
        for command in COMMANDS:
            assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_fits_into_80_columns(command: str, run: Run) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--help" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == f"gauge-ext {gauge_ext.__version__}"


def test_help_imports_nothing_heavy() -> None:
    # The package itself is stood in for, so that only the command line's own imports count.
    program = (
        "import sys, types\n"
        "package = types.ModuleType('gauge_ext')\n"
        f"package.__path__ = [{str(Path(gauge_ext.__file__).parent)!r}]\n"
        "sys.modules['gauge_ext'] = package\n"
        "from gauge_ext.cli import app\n"
        "app(['export', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--adapter" in done.stdout


def test_python_m_gauge_ext(tmp_path: Path) -> None:
    root = Path(gauge_ext.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "gauge_ext", "inspect", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: DIR: ")
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_every_gauge_error_becomes_one_paragraph() -> None:
    result = run_error(OptionError("--adapter", "two\nlines.", hint="Mend [this] so."))
    assert result.exit_code == 1
    assert result.stderr == "error: --adapter: two lines. Mend [this] so.\n"
    for error in (
        GaugeError("what is wrong.", hint="What to do."),
        WriteError("what is wrong.", hint="What to do."),  # an OSError too, shown as ours
    ):
        result = run_error(error)
        assert result.exit_code == 1
        assert result.stderr == "error: what is wrong. What to do.\n"


def test_the_machines_own_errors_are_explained_too() -> None:
    result = run_error(PermissionError(13, "Permission denied", "/root/secret"))
    assert result.exit_code == 1
    assert "/root/secret" in result.stderr
    assert "Traceback" not in result.output


def test_a_bug_keeps_its_traceback() -> None:
    result = run_error(ZeroDivisionError("a bug"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_warnings_are_one_line_on_stderr() -> None:
    app = typer.Typer()

    @app.command()
    @explains_errors
    def command() -> None:
        warnings.warn("mind\nthis", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = CliRunner().invoke(app)
    assert result.exit_code == 0
    assert result.stderr == "warning: mind this\n"


def test_blame_names_the_option_by_the_kind_of_error() -> None:
    others: dict[type[GaugeError], str] = {WriteError: "--out"}
    for raised, option in (
        (WriteError("full"), "--out"),
        (AdapterFormatError("bad", hint="Mend."), "BASE"),
        (OptionError("--batch", "small"), "--batch"),
    ):
        with pytest.raises(OptionError) as caught, blame("BASE", others):
            raise raised
        assert caught.value.option == option
        assert caught.value.message == raised.message
        assert caught.value.hint == raised.hint
    with pytest.raises(ValueError, match="not ours"), blame("BASE"):
        raise ValueError("not ours")
    assert not issubclass(OptionError, ConfigError)


def test_what_is_printed_while_working_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with working("testing") as progress:
        sys.stdout.write("chatter")
        progress("half", 0.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "chatter" in captured.err
