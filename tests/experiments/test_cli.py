"""Every mistake of the user is one line on standard error and exit code 2."""

import logging
import pathlib

import pytest
from absl import flags

from experiments import cli
from msa_jax.config import ConfigError
from msa_jax.train.checkpoint import CheckpointError

CONFIG_FILE = """
from msa_jax.config import AttentionConfig
from msa_jax.train.config import ExperimentConfig, to_config_dict

def get_config(arg=""):
    if arg not in ("", "gqa"):
        raise ValueError(f"no variant {arg!r}: choose gqa")
    return to_config_dict(ExperimentConfig(attention=AttentionConfig(kind=arg or "msa")))
"""


@pytest.fixture
def config_file(tmp_path) -> str:
    path = tmp_path / "model.py"
    path.write_text(CONFIG_FILE)
    return str(path)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    flags.DEFINE_integer("count", 1, "how many", flag_values=values)


def parse(*arguments: str):
    return cli.parse_with_config(["prog", *arguments], define_flags, usage="Does it.")


def run(capsys, *arguments: str) -> str:
    """The one line that a command line with a mistake leaves behind."""

    def main(argv):
        cli.parse_with_config(argv, define_flags, usage="Does it.")

    assert cli.run(main, ["prog", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.endswith("\n")
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("error: ")
    return errors


def test_flags_and_config_fields_of_every_type_arrive(config_file):
    values, config = parse(
        f"--config={config_file}",
        "--workdir=somewhere",
        "--config.attention.top_k=8",
        "--config.optimizer.learning_rate=1",
        "--config.attention.qk_norm=false",
        "--config.attention.mla.latent_dim=24",
        "--config.train.debug_nans",
        "--noconfig.attention.index_norm",
        "--config.data.source",
        "retrieval",
        "--config.mesh.fsdp=-1",
        "--config.mesh.data=1",
    )
    assert values.workdir == "somewhere"
    assert values.count == 1
    assert config.attention.top_k == 8
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert not config.attention.qk_norm
    assert config.attention.mla.latent_dim == 24
    assert not config.attention.index_norm
    assert config.train.debug_nans
    assert config.data.source == "retrieval"
    assert config.mesh.fsdp == -1


def test_the_text_after_the_colon_goes_to_get_config(config_file):
    assert parse(f"--config={config_file}")[1].attention.kind == "msa"
    assert parse("--config", f"{config_file}:gqa")[1].attention.kind == "gqa"


def test_fields_may_stand_before_the_config_file(config_file):
    _, config = parse("--config.attention.top_k=4", f"--config={config_file}")
    assert config.attention.top_k == 4


def test_calls_do_not_share_flags(config_file):
    parse(f"--config={config_file}", "--config.attention.top_k=8", "--count=3")
    values, config = parse(f"--config={config_file}")
    assert config.attention.top_k == 16
    assert values.count == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--config.attention.topk=8"],
            ["config.attention.topk: no such field", "attention.top_k?"],
        ),
        (["--config.atention.top_k=8"], ["did you mean --config.attention.top_k?"]),
        (["--config.top_k=8"], ["did you mean --config.", ".top_k?"]),
        (["--config.learning_rate=8"], ["did you mean --config.optimizer.learning_rate?"]),
        (["--noconfig.train.debug_nan"], ["did you mean --config.train.debug_nans?"]),
        (["--config.qqqq=8"], ["no such field", "msa_jax/train/config.py"]),
        (["--config.attention=8"], ["it is a section"]),
        (["--config.attention.mla=8"], ["it is a section", "--config.attention.mla.latent_dim"]),
        (["--config.attention.mla.latentdim=8"], ["--config.attention.mla.latent_dim?"]),
        (["--config.attention.mla.latent_dim=0"], ["attention.mla.latent_dim=0: must be >= 1"]),
        (["--config.attention.top_k=many"], ["config.attention.top_k=many", "int"]),
        (["--config.attention.top_k=1.5"], ["config.attention.top_k=1.5", "int"]),
        (["--config.train.debug_nans=7"], ["config.train.debug_nans=7", "boolean"]),
        (["--config.attention.top_k"], ["Missing value", "config.attention.top_k"]),
        (["--config.attention.top_k=0"], ["attention.top_k=0: must be >= 1"]),
        (["--config.data.source=web"], ["data.source='web': choose one of 'stdlib'"]),
        (["--config.data.sequence_length=100"], ["data.sequence_length=100", "block_size=128"]),
        (["--wrkdir=x"], ["Unknown command line flag 'wrkdir'", "workdir"]),
        (["--count=x"], ["--count=x", "int"]),
        (["stray"], ["unexpected argument 'stray'"]),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, config_file, arguments, parts):
    error = run(capsys, f"--config={config_file}", *arguments)
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--workdir=x"], "--config is missing"),
        (["--config.attention.top_k=8"], "--config is missing"),
        (["--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
        (["--config"], "--config is empty"),
        (["--config=absent.py"], "there is no file 'absent.py'"),
    ],
)
def test_a_missing_config_is_one_line(capsys, arguments, part):
    assert part in run(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("def get_config(: pass", "SyntaxError"),
        ("x = 1", "has no attribute 'get_config'"),
        ("x = 1\nimport absent_module", "model.py, line 2: ModuleNotFoundError"),
        ("def get_config():\n  x = {}\n  return x['a']", "model.py, line 3: KeyError: 'a'"),
        ("def get_config(): return 1", "returned a int; return to_config_dict"),
    ],
)
def test_a_config_file_that_fails_is_one_line_that_says_where(capsys, tmp_path, text, part):
    path = pathlib.Path(tmp_path, "model.py")
    path.write_text(text)
    assert part in run(capsys, f"--config={path}")


def test_an_unknown_variant_is_one_line(capsys, config_file):
    assert "no variant 'mqa': choose gqa" in run(capsys, f"--config={config_file}:mqa")


def test_an_argument_for_a_config_without_variants_is_one_line(capsys, tmp_path):
    path = pathlib.Path(tmp_path, "model.py")
    path.write_text("def get_config(): return 1")
    assert "takes 0 positional arguments" in run(capsys, f"--config={path}:gqa")


def test_a_field_that_the_config_file_invents_is_one_line(capsys, tmp_path):
    path = pathlib.Path(tmp_path, "model.py")
    path.write_text(
        "import ml_collections\n"
        "def get_config(): return ml_collections.ConfigDict({'attention': {'topk': 1}})"
    )
    assert "attention.topk: no such field" in run(capsys, f"--config={path}")


def test_a_script_without_a_config(capsys):
    values = cli.parse(["prog", "--count=2"], define_flags)
    assert values.count == 2
    assert cli.run(lambda argv: cli.parse(argv, define_flags), ["prog", "--config=x"]) == 2
    assert "Unknown command line flag 'config'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--workdir=x", "-h"]])
def test_help_prints_the_docstring_and_the_flags(capsys, arguments):
    with pytest.raises(SystemExit) as exit_info:
        parse(*arguments)
    assert exit_info.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("Does it.\n")
    assert "--workdir" in output


@pytest.mark.parametrize("error", [ConfigError("a\nb"), CheckpointError("a\nb")])
def test_errors_of_the_user_inside_the_script_are_one_line(capsys, error):
    def main(argv):
        raise error

    assert cli.run(main, ["prog"]) == 2
    assert capsys.readouterr().err == "error: a b\n"


def test_errors_of_the_program_keep_their_traceback_and_codes_pass():
    def main(argv):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        cli.run(main, ["prog"])
    assert cli.run(lambda argv: None, ["prog"]) == 0
    assert cli.run(lambda argv: 143, ["prog"]) == 143


def test_scripts_say_once_which_implementation_of_an_op_runs(capsys):
    """Also where a library gave the root logger a handler; afterwards all is as it was."""
    logger, root = logging.getLogger("pallas_kernels"), logging.StreamHandler()
    before = logger.level, logger.propagate, list(logger.handlers)
    logging.root.addHandler(root)
    try:
        for _ in range(2):
            cli.run(lambda argv: logger.info("%s runs as %r", "op", "reference"), ["script"])
    finally:
        logging.root.removeHandler(root)
    assert capsys.readouterr().err.splitlines() == ["op runs as 'reference'"] * 2
    assert (logger.level, logger.propagate, logger.handlers) == before
