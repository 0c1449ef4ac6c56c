"""Recipes: what is read, what is refused and how it is said, and that nothing is lost on the way to a file and back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml

from hfpatch.errors import ConfigError, UnknownNameError
from hfpatch.notation import dump_yaml, parse_size, parse_value
from hfpatch.recipe import PatchSpec, Recipe, load_recipe, resolve, shipped_recipes

FULL = """\
version: 1
name: full
model: {id: some/model, revision: '0123e45', dtype: bf16, device_map: {"": cpu}, trust_remote_code: false}
patches:
  - use: swa
    layers: "2:"
    params: {window: 4k, full_layers: [1, 3], note: "4k", ratio: 25%, rare: 1e-5}
  - {use: head_scale, heads: {3: [0, 1], 5: [2]}, phase: decode}
runtime: {kernel: sdpa, strict: true, seed: null}
generation: {max_new_tokens: 8}
prompt: {chat_template: false, system: "no"}
evals:
  - {task: niah, lengths: [1k, 2k], depths: "0:100:10", path: "C:\\\\x #1"}
bench: {lengths: [1k], repeats: 2}
output: {dir: out, formats: [md]}
expect:
  - {metric: niah.contains, value: 1, tol: 0.02, source: "a: b, c"}
"""


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("HFPATCH_KERNEL", "HFPATCH_STRICT"):
        monkeypatch.delenv(name, raising=False)


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(text)
    return str(caught.value)


def test_values_are_read_as_meant():
    recipe = load_recipe(FULL)
    window, scale = recipe.patches
    assert window.params == {"window": 4096, "full_layers": [1, 3], "note": "4k", "ratio": 0.25, "rare": 1e-5}
    assert window.layers == "2:"
    assert scale.heads == {3: [0, 1], 5: [2]}
    assert recipe.model.revision == "0123e45" and recipe.prompt.system == "no"
    assert recipe.runtime.seed is None and recipe.evals[0]["lengths"] == [1024, 2048]
    assert recipe.expect[0].value == 1.0 and isinstance(recipe.expect[0].value, float)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_round_trip_is_exact(tmp_path, suffix):
    recipe = load_recipe(FULL)
    again = load_recipe(recipe.save(tmp_path / f"r{suffix}"))
    if suffix == ".json":
        # JSON has no unquoted text, so text that looks like a size is one
        assert again.patches[0].params.pop("note") == 4096
        recipe.patches[0].params.pop("note")
    assert again == recipe
    assert again.hash() == recipe.hash()
    assert list(tmp_path.iterdir()) == [tmp_path / f"r{suffix}"]


def test_saved_yaml_means_the_same_to_any_yaml_reader(tmp_path):
    recipe = load_recipe({"version": 1, "model": {"id": "m", "revision": "1e5"}, "prompt": {"system": "2:10"}})
    path = recipe.save(tmp_path / "r.yaml")
    assert yaml.safe_load(path.read_text()) == recipe.to_dict()
    assert load_recipe(path).model.revision == "1e5"


def test_saving_elsewhere_than_yaml_and_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\.yaml or \.json"):
        load_recipe(FULL).save(tmp_path / "r.toml")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = load_recipe(FULL).save(tmp_path / "r.yaml")
    before = path.read_text()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        load_recipe("version: 1\nmodel: {id: other}\n").save(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_toml_and_json_say_the_same_as_yaml(tmp_path):
    (tmp_path / "r.toml").write_text(
        'version = 1\n[model]\nid = "m"\n[[patches]]\nuse = "swa"\nlayers = "2:"\n[patches.params]\nwindow = "1k"\n'
    )
    (tmp_path / "r.json").write_text(
        '{"version": 1, "model": {"id": "m"},\n\t'
        '"patches": [{"use": "swa", "layers": "2:", "params": {"window": "1k"}}]}'
    )
    (tmp_path / "r.yaml").write_text(
        'version: 1\nmodel: {id: m}\npatches:\n  - {use: swa, layers: "2:", params: {window: 1k}}\n'
    )
    toml, by_json, by_yaml = (load_recipe(tmp_path / f"r.{suffix}") for suffix in ("toml", "json", "yaml"))
    assert toml == by_json == by_yaml
    assert toml.patches[0].params == {"window": 1024} and toml.name == "r"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 1\nmodle: {id: x}\n", "text:2: modle: unknown key. Did you mean 'model'?"),
        (
            "version: 1\npatches:\n  - use: sa\n    parms: {}\n",
            "text:4: patches.0.parms: unknown key. Did you mean 'params'?",
        ),
        ("version: 1\nmatrx: {}\n", "text:2: matrx: unknown key. Did you mean 'matrix'?"),
        ("version: 1\nruntime:\n  strict: maybe\n", "text:3: runtime.strict: 'maybe' is text; it takes true or false"),
        ("version: 1\nruntime: {seed: true}\n", "seed: True is true or false; it takes a whole number or null"),
        ("version: 1\nmodel: {id: 7}\n", "model.id: 7 is a whole number; it takes text. Put it in quotes."),
        ("version: 1\nmodel: x\n", "model: 'x' is text; it takes a mapping"),
        ("version: 1\noutput: {formats: [pdf]}\n", "output.formats.0: 'pdf' is not one of: md, html"),
        ("version: 1\nbaseline: runs/x\n", "baseline: 'runs/x' is not one of: dense, none"),
        ("version: 1\nexpect: [{metric: x}]\n", "expect.0: 'value' is missing"),
        ("version: 1\nexpect: [{metric: x, value: .nan}]\n", "expect.0.value: '.nan' is text"),
        ("version: 1\npatches: [{use: sa, heads: {a: [1]}}]\n", "heads.a: 'a' is text; it takes a whole number"),
        ("version: 1\nevals: [{lengths: 1}]\n", "evals.0 names no task"),
        ("version: 1\nname: ../../etc\n", "folder name"),
        ("version: 1\nname: a\nname: b\n", "text:3: not valid YAML: key 'name' is there twice"),
        ("version: 1\nx: &a 1\ny: *a\n", "text:3: not valid YAML: aliases"),
        ("version: 1\nname: !!python/name:os.system\n", "text:2: not valid YAML"),
        ("version: 1\n  x: [\n", "not valid YAML"),
        ("model: {id: x}\n\n", "`version` is missing"),
        (
            "version: 2\nnovelty: 1\n",
            "text:1: version: this recipe has version 2, this hfpatch reads 1: upgrade",
        ),
        ("version: one\n", "'one' is not a recipe version"),
        ("- 1\n- 2\n", "a recipe is a mapping"),
        ("\n", "a recipe is a mapping"),
        ("[" * 5000 + "\n", "nested too deeply"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text, said):
    assert said in refusal(text)


def test_lines_are_known_in_toml_and_json_too(tmp_path):
    (tmp_path / "r.toml").write_text('version = 1\n[model]\nid = "m"\nidd = "n"\n')
    with pytest.raises(ConfigError, match=r"r\.toml:4: model\.idd: unknown key"):
        load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.json").write_text('{"version": 1,\n "model": {\n  "idd": 1}}')
    with pytest.raises(ConfigError, match=r"r\.json:3: model\.idd: unknown key"):
        load_recipe(tmp_path / "r.json")
    (tmp_path / "twice.json").write_text('{"version": 1, "name": "a", "name": "b"}')
    with pytest.raises(ConfigError, match="'name' is there twice"):
        load_recipe(tmp_path / "twice.json")


def test_environment_variables_in_text_stay_text(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert load_recipe("version: 1\nmodel: {id: '${SECRET}'}\n").model.id == "${SECRET}"


def test_missing_files_and_names(tmp_path):
    with pytest.raises(ConfigError, match="no recipe file"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="must end in"):
        load_recipe("model.bin")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'sa-smoke'\?"):
        load_recipe("recipe:sa-smok")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read"):
        load_recipe(tmp_path / "bad.yaml")


def test_a_recipe_is_found_by_the_name_of_its_patcher():
    assert load_recipe("recipe:dhsa_block-smoke").name == "dhsa-block-smoke"


def test_hash_counts_what_decides_the_results():
    recipe = load_recipe(FULL)
    assert recipe.hash() == load_recipe(FULL).hash() and len(recipe.hash()) == 64
    assert recipe.override({"name": "other", "output.dir": "elsewhere"}).hash() == recipe.hash()
    for path, value in {
        "runtime.seed": 1,
        "patches.0.params.window": 8,
        "evals.0.lengths": [5],
        "model.id": "x",
    }.items():
        assert recipe.override({path: value}).hash() != recipe.hash(), path
    # a change of this value breaks the resuming of old runs: raise VERSION with it
    assert load_recipe({"version": 1, "model": {"id": "m"}}).hash() == (
        "b029efac4c5fcafaa2adec2642dff53b8a96d40b926d62a4a2bbaf030a650fa4"
    )


def test_override_by_dotted_path():
    recipe = load_recipe(FULL)
    changed = recipe.override({"patches.0.params.window": 64, "evals.0.samples": 3, "runtime.kernel": "auto"})
    assert changed.patches[0].params["window"] == 64 and changed.evals[0]["samples"] == 3
    assert recipe.patches[0].params["window"] == 4096, "the original must not change"
    assert load_recipe("version: 1\nname: x\n").override({"bench.lengths": [8]}).bench == {"lengths": [8]}
    for path, said in {
        "runtime.kernl": "Did you mean 'kernel'",
        "patches.7.use": "has 2 entries, there is no number '7'",
        "name.x": "name is text",
        "runtime.seed": "it takes a whole number or null",
    }.items():
        with pytest.raises(ConfigError, match=said):
            recipe.override({path: "text"})


def test_precedence_and_origin(monkeypatch, tmp_path):
    monkeypatch.setenv("HFPATCH_KERNEL", "cpu_blocks")
    monkeypatch.setenv("HFPATCH_STRICT", "true")
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\nmodel:\n  id: m\nruntime: {strict: false}\n")
    recipe, origins = resolve(path, {"runtime.seed": (3, "--seed")})
    assert (recipe.runtime.kernel, recipe.runtime.strict, recipe.runtime.seed) == ("cpu_blocks", False, 3)
    assert origins["runtime.kernel"] == "HFPATCH_KERNEL"
    assert origins["runtime.strict"] == f"{path}:4"
    assert origins["model.id"] == f"{path}:3"
    assert origins["runtime.seed"] == "--seed"
    assert origins["model.dtype"] == "default"
    recipe, origins = resolve(path, {"runtime.kernel": ("sdpa", "--kernel")})
    assert (recipe.runtime.kernel, origins["runtime.kernel"]) == ("sdpa", "--kernel")
    # what is replaced as a whole leaves no trace of where its parts came from
    path.write_text('version: 1\npatches: [{use: sa, layers: "2:"}]\n')
    assert resolve(path)[1]["patches.0.layers"] == f"{path}:2"
    origins = resolve(path, {"patches": ([{"use": "swa"}], "--patch")})[1]
    assert (origins["patches.0.use"], origins["patches.0.layers"]) == ("--patch", "default")
    # a full recipe does not look at the environment again
    assert load_recipe(load_recipe(FULL)).runtime.kernel == "sdpa"
    monkeypatch.setenv("HFPATCH_STRICT", "perhaps")
    with pytest.raises(ConfigError, match=r"HFPATCH_STRICT: runtime\.strict: 'perhaps' is text"):
        load_recipe("version: 1\nname: x\n")


def test_head_files_lie_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "heads.json").write_text(json.dumps({"2": [0, 1]}))
    (tmp_path / "sub" / "r.yaml").write_text("version: 1\npatches:\n  - {use: head_scale, heads: heads.json}\n")
    recipe, origins = resolve(tmp_path / "sub" / "r.yaml")
    assert recipe.patches[0].heads == {2: [0, 1]}
    assert "r.yaml:3 (heads.json)" in origins["patches.0.heads.2.0"]
    # the copy needs no other file
    assert load_recipe(recipe.save(tmp_path / "copy.yaml")) == load_recipe(recipe)
    (tmp_path / "lost.yaml").write_text("version: 1\npatches:\n  - {use: head_scale, heads: heads.json}\n")
    with pytest.raises(ConfigError, match=r"lost\.yaml:3: patches\.0\.heads: there is no head file"):
        load_recipe(tmp_path / "lost.yaml")


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("sa", {}),
        ("sa:window=512,sink=4", {"window": 512, "sink": 4}),
        ("sa:window=4k,keep=25%,small=1e-5", {"window": 4096, "keep": 0.25, "small": 1e-5}),
        ("sa:full_layers=[1,3],note='a, b'", {"full_layers": [1, 3], "note": "a, b"}),
        ('sa:note="4k",flag=true,nothing=null', {"note": "4k", "flag": True, "nothing": None}),
        ("sa:word=no,text=a=b", {"word": "no", "text": "a=b"}),
    ],
)
def test_spec_strings(text, params):
    spec = PatchSpec.parse(text)
    assert spec == PatchSpec("sa", params)
    assert PatchSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("layers", ["2:", "-4:", "::2", "odd", 3, -1, [0, 2], "0-3,8"])
def test_spec_strings_with_selectors(layers):
    spec = PatchSpec("sa", {"window": 8}, layers, {3: [0, 1]}, "prefill")
    assert PatchSpec.parse(str(spec)) == spec
    if isinstance(layers, str) and "," not in layers:
        assert PatchSpec.parse(f"sa:layers={layers}").layers == layers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not of the form"),
        ("sa:", "not of the form"),
        ("a b", "not of the form"),
        ("sa:window", "'window' is not of the form key=value"),
        ("sa:layers=0-3,8", "takes brackets"),
        ("sa:window=1,window=2", "given twice"),
        ("sa:phase=sometimes", "not one of: prefill, decode, both"),
        ("sa:x=[1", "not valid YAML"),
    ],
)
def test_bad_spec_strings(text, said):
    with pytest.raises(ConfigError, match=r".*") as caught:
        PatchSpec.parse(text)
    assert said in str(caught.value)


def test_sizes():
    assert [parse_size(x) for x in ("4096", "4k", "1.5K", "1M", "25%", "0.25")] == [
        4096,
        4096,
        1536,
        1 << 20,
        0.25,
        0.25,
    ]
    assert parse_value("4k") == 4096 and parse_value("'4k'") == "4k" and parse_value("4kb") == "4kb"
    for bad in ("four", "true", "k", "[1]"):
        with pytest.raises(ConfigError, match="not a number"):
            parse_size(bad)


@pytest.fixture
def named_files(tmp_path, monkeypatch):
    """The files that shipped recipes name, which their comments say how to make or where to get."""
    from hfpatch.calibrated import Header, ModelSizes, encode
    from hfpatch.methods.act import HEADS
    from hfpatch.methods.head_gate import FAR

    monkeypatch.chdir(tmp_path)
    for folder in ("banking77", "babi"):
        (tmp_path / folder).mkdir()
    labels = "card arrival, exchange rate, pin blocked, top up failed, age limit, country support, lost or stolen card"
    rows = [f"why?,{label.replace(' ', '_')}" for label in [*labels.split(", "), "request refund"]]
    passage = {"isgold": True, "title": "t", "text": "Ada Byron wrote it."}
    for name, text in {
        "heads.json": '{"0-0": [1.0]}',
        "act-heads.json": encode(Header(HEADS, {}, ModelSizes(30, 9, 3, 64)), {"layers": {"2": [0]}}).decode(),
        "far.json": encode(Header(FAR, {}, ModelSizes(30, 9, 3, 64)), {"far": [[0.0] * 9] * 30}).decode(),
        "banking77/test.csv": "\n".join(["text,category", *rows]),
        "babi/qa6_yes-no-questions_test.txt": "1 John got the milk.\n2 Is John there?\tno\t1",
        "nq-open-oracle.jsonl.gz": json.dumps(
            {"question": "who wrote it", "answers": ["Ada Byron"], "ctxs": [passage]}
        ),
    }.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_fit_the_methods_and_tasks(name, named_files):
    import hfpatch
    from hfpatch.evals.work import Work

    recipe = load_recipe(f"recipe:{name}")
    assert recipe.name == name
    for one in [point.recipe for point in recipe.points()] if recipe.matrix else [recipe]:
        for spec in one.patches:
            hfpatch.get_patcher(spec.use).from_options(spec.params)
        assert Work.of(one).items(None)
    if name.endswith("-smoke") or name == "demo":
        assert recipe.model.id in ("packaged:smollm2-135m-instruct", "packaged:tinyshapes-llava")
    if name.endswith("-paper"):
        assert recipe.expect and all(wanted.source for wanted in recipe.expect)


def test_recipes_are_found_in_a_wheel_and_in_a_checkout(tmp_path, monkeypatch):
    import hfpatch.recipe as module

    for inside in (True, False):
        root = tmp_path / str(inside)
        folder = (root / "hfpatch" if inside else root) / "recipes"
        folder.mkdir(parents=True)
        (root / "hfpatch").mkdir(exist_ok=True)
        (folder / "mine.yaml").write_text("version: 1\n")
        monkeypatch.setattr(module, "__file__", str(root / "hfpatch" / "recipe.py"))
        assert shipped_recipes() == {"mine": folder / "mine.yaml"}


def test_a_given_dict_stays_untouched(monkeypatch):
    monkeypatch.setenv("HFPATCH_KERNEL", "sdpa")
    given = {"version": 1, "runtime": {}, "patches": [{"use": "sa", "params": {"window": "1k"}}]}
    copy = json.loads(json.dumps(given))
    assert load_recipe(given).runtime.kernel == "sdpa"
    assert load_recipe(given).patches[0].params == {"window": 1024}
    assert given == copy
    assert isinstance(load_recipe(Path(shipped_recipes()["demo"])), Recipe)
    assert dump_yaml({"a": "no", "b": "4k"}) == "a: 'no'\nb: '4k'\n"


# Sweeps ---------------------------------------------------------------------------------------------------------------

SWEEP = """\
version: 1
name: s
patches:
  - {use: swa, params: {window: 1k}}
  - {use: head_scale, params: {factor: 2}, heads: {1: [0]}}
matrix:
  patches.0.params.window: [256, 1k]
  runtime.seed: [0, 1, 2]
expect:
  - {metric: niah.contains, value: 0.9, at: {patches.0.params.window: 1k, runtime.seed: 1}}
  - {metric: niah.contains, value: 0.5}
"""


def test_points_are_every_combination_in_the_order_typed():
    recipe = load_recipe(SWEEP)
    points = recipe.points()
    assert [(p.recipe.patches[0].params["window"], p.recipe.runtime.seed) for p in points] == [
        (256, 0), (256, 1), (256, 2), (1024, 0), (1024, 1), (1024, 2)
    ]  # fmt: skip
    assert [p.number for p in points] == [1, 2, 3, 4, 5, 6]
    assert points[4].values == {"patches.0.params.window": 1024, "runtime.seed": 1}
    assert points[4].label == "window=1024, seed=1" and points[4].recipe.name == "s-05"
    # a point is what its values typed by hand would be
    by_hand = load_recipe(SWEEP).override({"matrix": {}, "expect": [{"metric": "niah.contains", "value": 0.5}]})
    assert points[1].recipe.hash() == by_hand.override({"patches.0.params.window": 256, "runtime.seed": 1}).hash()
    assert points[1].recipe.matrix == {} and len({p.recipe.hash() for p in points}) == 6
    # the number bound to a point goes with it alone
    assert [len(p.recipe.expect) for p in points] == [1, 1, 1, 1, 2, 1]
    assert [want.value for want in points[4].recipe.expect] == [0.9, 0.5]
    assert load_recipe("version: 1\nname: x\n").points()[0].values == {}


def test_what_a_point_is_called():
    def labels(matrix):
        more = {"patches": [{"use": "swa"}, {"use": "sa"}], "evals": [{"task": "niah"}, {"task": "niah"}]}
        return [p.label for p in load_recipe({"version": 1, **more, "matrix": matrix}).points()]

    whole = [[], [{"use": "sa", "params": {"window": 9}, "layers": "2:"}, {"use": "act"}]]
    assert labels({"patches": whole}) == ["dense", "sa:window=9,layers='2:' + act"]
    assert labels({"patches.1": [{"use": "act"}, {"use": "swa"}]}) == ["act", "swa"]
    # as short as can be told apart
    both = {"patches.0.params.window": [1], "patches.1.params.window": [2, 3]}
    assert labels(both)[1] == "patches.0.params.window=1, patches.1.params.window=3"
    assert labels({"evals.0.lengths": [[8], [9, 10]]}) == ["lengths=[8]", "lengths=[9, 10]"]
    assert labels({"prompt.system": ["x" * 99]})[0].endswith("…")


def test_a_sweep_survives_saving_and_counts_in_the_hash(tmp_path):
    recipe = load_recipe(SWEEP)
    for name in ("r.yaml", "r.json"):
        again = load_recipe(recipe.save(tmp_path / name))
        assert again == recipe and again.hash() == recipe.hash() and list(again.matrix) == list(recipe.matrix)
    assert recipe.hash() != recipe.override({"matrix.runtime.seed": [0, 1]}).hash()
    assert recipe.override({"matrix.runtime.seed": [0, 1]}).matrix["runtime.seed"] == [0, 1]
    # another order is another sweep, as its points have other numbers
    turned = dict(reversed(recipe.matrix.items()))
    assert recipe.hash() != recipe.override({"matrix": turned}).hash()
    added, origins = resolve(recipe, {"matrix.patches.1.params.factor": ([1, 2], "--set")})
    assert len(added.points()) == 12 and origins["matrix.patches.1.params.factor.0"] == "--set"


def test_a_sweep_in_toml(tmp_path):
    text = """\
version = 1
[[patches]]
use = "swa"
[matrix]
"patches.0.params.window" = ["1k", "2k"]
"prompt.system" = ["4k"]
[[expect]]
metric = "niah.contains"
value = 1
at = {"patches.0.params.window" = "2k"}
"""
    (tmp_path / "r.toml").write_text(text)
    recipe = load_recipe(tmp_path / "r.toml")
    assert [p.recipe.patches[0].params["window"] for p in recipe.points()] == [1024, 2048]
    assert recipe.matrix["prompt.system"] == ["4k"] and len(recipe.points()[1].recipe.expect) == 1
    (tmp_path / "r.toml").write_text(
        text.replace('"patches.0.params.window" = ["1k"', 'patches.0.params.window = ["1k"')
    )
    with pytest.raises(ConfigError, match=r"r\.toml:\d+: matrix\.patches: takes a list.*in TOML with quotes"):
        load_recipe(tmp_path / "r.toml")


def test_head_files_in_a_sweep(tmp_path):
    for n in (1, 2):
        (tmp_path / f"h{n}.json").write_text(json.dumps({n: [0]}))
    for path, values in {
        "patches.0.heads": "[h1.json, h2.json]",
        "patches.0": "[{use: head_scale, heads: h1.json}, {use: head_scale, heads: h2.json}]",
        "patches": "[[{use: head_scale, heads: h1.json}], [{use: head_scale, heads: h2.json}]]",
    }.items():
        (tmp_path / "r.yaml").write_text(f"version: 1\npatches: [{{use: head_scale}}]\nmatrix: {{{path}: {values}}}\n")
        recipe = load_recipe(tmp_path / "r.yaml")
        assert [p.recipe.patches[0].heads for p in recipe.points()] == [{1: [0]}, {2: [0]}], path
        (tmp_path / "else").mkdir(exist_ok=True)
        # the copy needs no other file
        assert load_recipe(recipe.save(tmp_path / "else" / "r.yaml")).points() == recipe.points()
    (tmp_path / "r.yaml").write_text("version: 1\npatches: [{use: x}]\nmatrix: {patches.0.heads: [h3.json]}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml:3: matrix\.patches\.0\.heads\.0: there is no head file"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ("{runtime.kernl: [a]}", "text:3: matrix: runtime.kernl: unknown key. Did you mean 'kernel'?"),
        ("{patches.3.use: [a]}", "text:3: matrix patches.3.use: patches has 1 entries, there is no number '3'"),
        ("{runtime.seed.x: [1]}", "text:3: matrix runtime.seed.x: runtime.seed is a whole number"),
        ("{runtime.seed: [0, x]}", "text:3: matrix: runtime.seed: 'x' is text; it takes a whole number or null"),
        ("{runtime.seed: [1, 1]}", "text:3: matrix: points 1 and 2 (seed=1) are the same run"),
        ("{patches.0.use: [a, b], patches: [[{use: c}]]}", "are the same run"),
        ("{evals: [[{lengths: 1}]]}", "text:3: matrix: evals.0 names no task"),
        ("{runtime.seed: 1}", "matrix.runtime.seed: 1 is a whole number; it takes a list"),
        ("{runtime.seed: []}", "matrix.runtime.seed has no values"),
        ("{runtime: {seed: [1]}}", "text:3: matrix.runtime: takes a list of values. A path is one key here"),
        ("{output.dir: [a, b]}", "'output.dir' decides no result"),
        ("{1: [1]}", "matrix.1: 1 is a whole number; it takes text"),
        ("3", "matrix: 3 is a whole number; it takes a mapping"),
        (
            "{runtime.seed: [1]}\nexpect: [{metric: a.b, value: 1, at: {runtime.seed: 2}}]",
            "no point of the sweep has 2",
        ),
        ("{}\nexpect: [{metric: a.b, value: 1, at: {runtime.seed: 2}}]", "no point of the sweep has 2 there"),
    ],
)
def test_bad_matrices(matrix, said):
    assert said in refusal(f"version: 1\npatches: [{{use: sa}}]\nmatrix: {matrix}\n")
