"""Writes workflows/*.json and, with --thumbnails, workflows/*.jpg.

    python tests/comfy/make_workflows.py [--thumbnails] [--only NAME] [--sheet all.png]

What the embedded model draws is its thumbnail. Where weights must be downloaded there is nothing to draw, and the
thumbnail is the graph itself, as the frontend shows it.

Needs a ComfyUI (COMFYUI_PATH, COMFYUI_PYTHON), which it starts and ends itself, and numpy, Pillow, websocket-client;
for pictures of graphs also what the tests of the frontend need.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.comfy.canvas import Page
from tests.comfy.client import Client
from tests.comfy.gallery import WORKFLOWS
from tests.comfy.gallery_models import MODEL_WORKFLOWS
from tests.comfy.packname import pack_properties
from tests.comfy.server import REPO, Server, find_comfy
from tests.comfy.standin_server import make_standin_base
from tests.comfy.thumbnails import compose, contact_sheet, graph, pictures

FOLDER = REPO / "workflows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thumbnails", action="store_true", help="write the pictures too")
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--sheet", type=Path, help="write all thumbnails on one sheet, for the eye")
    options = parser.parse_args()
    comfy = find_comfy()
    if isinstance(comfy, str):
        parser.error(comfy)
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(comfy, make_standin_base(Path(folder) / "base", comfy)) as server,
    ):
        client = Client(server)
        infos = client.object_info()
        for name, describe in {**WORKFLOWS, **MODEL_WORKFLOWS}.items():
            if options.only in name:
                _make(client, infos, name, describe, options.thumbnails)
    if options.sheet:
        contact_sheet(sorted(FOLDER.glob("*.jpg"))).save(options.sheet)


def _make(client: Client, infos: dict, name: str, describe, thumbnail: bool) -> None:
    page = Page(infos, pack_properties())
    describe(page)
    workflow = page.json()
    (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if thumbnail:
        drawn = graph(client.server, name, page) if name in MODEL_WORKFLOWS else pictures(client, page, workflow)
        compose(drawn).save(FOLDER / f"{name}.jpg", quality=88, optimize=True)
    print(name, flush=True)


if __name__ == "__main__":
    main()
