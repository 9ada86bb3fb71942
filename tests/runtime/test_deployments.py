"""The deployments of the docs, checked by schemas. A test needs the package that has its schema."""

import json
import re
from copy import deepcopy
from importlib.resources import files
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

PAGE = (ROOT / "docs/how-to/serve.md").read_text(encoding="utf-8")


def documents(name: str) -> list[Any]:
    """Return the content of a file of the page."""
    return list(yaml.safe_load_all(PAGE.partition(f'title="{name}"\n')[2].partition("```")[0]))


def changed(content: Any, key: str, new: str) -> Any:
    """Return a copy in which a key, at any depth, has another name."""
    if isinstance(content, list):
        return [changed(item, key, new) for item in content]
    if isinstance(content, dict):
        return {new if name == key else name: changed(value, key, new) for name, value in content.items()}
    return deepcopy(content)


@pytest.mark.parametrize("version", ["1.30.0", "1.33.0"])
def test_kubernetes(version: str) -> None:
    """The field ``preStop.sleep`` is new in 1.30."""
    validate = pytest.importorskip("kubernetes_validate").validate
    contents = documents("k8s.yaml")
    assert [content["kind"] for content in contents] == ["Deployment", "Service"]
    for content in contents:
        validate(content, version, strict=True)
    for key in ("containerPort", "replicas", "preStop", "httpGet"):
        with pytest.raises(Exception, match=r"not allowed|required property"):
            validate(changed(contents[0], key, "nope"), version, strict=True)


def misfits(content: Any, kind: str, path: str = "") -> list[str]:
    """Return the paths in ``content`` that a class of KServe's Python package, or of Kubernetes', does not have."""
    import kserve
    import kubernetes

    if match := re.fullmatch(r"[lL]ist\[(.+)\]", kind):
        items = enumerate(content if isinstance(content, list) else [None])
        return [each for index, item in items for each in misfits(item, match[1], f"{path}[{index}]")]
    if match := re.fullmatch(r"[dD]ict[(\[]str, (.+)[)\]]", kind):
        return [each for name, value in content.items() for each in misfits(value, match[1], f"{path}.{name}")]
    if kind in ("str", "int", "bool", "object"):
        return [] if kind == "object" or type(content).__name__ == kind else [path]
    model = getattr(kserve, kind, None) or getattr(kubernetes.client, kind)
    fields = {name: model.openapi_types[field] for field, name in model.attribute_map.items()}
    return [
        each
        for name, value in content.items()
        for each in (misfits(value, fields[name], f"{path}.{name}") if name in fields else [f"{path}.{name}"])
    ]


def test_kserve() -> None:
    pytest.importorskip("kserve")
    (content,) = documents("kserve.yaml")
    assert (content["apiVersion"], content["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert misfits(content, "V1beta1InferenceService") == []
    wrong = changed(content, "containerPort", "nope")
    assert misfits(wrong, "V1beta1InferenceService") == [".spec.predictor.containers[0].ports[0].nope"]


def test_compose() -> None:
    pytest.importorskip("check_jsonschema")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    (content,) = documents("compose.yaml")
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError, match="'nope' was unexpected"):
        jsonschema.validate(changed(content, "volumes", "nope"), schema)
