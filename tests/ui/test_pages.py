"""The pages, without a browser: what is on them, what their buttons do, and what they say when something is wrong."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("nicegui")
from nicegui import ui
from nicegui.testing.user_simulation import user_simulation

from nnunet_dante.adaptation.running import claimed
from nnunet_dante.errors import DanteError, StorageError
from nnunet_dante.ui import ask, data, plan, result, runs, start
from nnunet_dante.ui.pages import add_pages
from nnunet_dante.ui.roots import Roots
from nnunet_dante.ui.viewer import Viewer

DONOR = {"donor": "/models/D", "name": "Dataset900_Donor", "problem": "", "labels": ["Organ", "vessel"], "channels": ["MRI"],
         "spacing_mm": [1.0, 1.0, 3.0], "trainer": "nnUNetTrainer", "configuration": "3d_fullres", "folds": ["0"], "size": 2**20,
         "licence": "CC-BY-NC 4.0\nNot for <b>commerce</b>."}
BROKEN = {**DONOR, "donor": "/models/B", "name": "Dataset901_Broken", "problem": "it holds no checkpoint", "labels": []}
CASE = {"name": "P01", "patient": "P01", "masks": True, "voxels": {"organ": 12}, "shape": [4, 5, 6], "spacing": [1, 1, 2],
        "faults": [], "warnings": [], "picture": ""}
SEEN = {"problem": "", "labels": ["organ", "lesion"], "channels": ["MRI"], "lines": ["Found: <b>two</b> folders."], "cases": [CASE]}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder to be adapted to, answers of the other processes, and what was asked and started."""
    (tmp_path / "images").mkdir()
    answers, asked, started = {"donors": [DONOR, BROKEN], "look": SEEN}, [], []

    async def answer(name, *arguments):
        asked.append((name, *arguments))
        if isinstance(found := answers[name], Exception):
            raise found
        return found

    for module in (start, data, plan):
        monkeypatch.setattr(module, "ask", answer)
    monkeypatch.setattr(runs, "_launch", started.append)
    monkeypatch.setattr(start, "_donors", {})
    monkeypatch.setattr(data, "_seen", {})
    return tmp_path, answers, asked, started


def visit(root, *, steps):
    """Open pages as a user does; `steps` is a coroutine function that gets the user."""
    async def go():
        async with user_simulation(root=lambda: None) as user:
            add_pages(Roots.given([root]))
            await steps(user)

    asyncio.run(go())


def test_three_clicks_from_the_folder_to_a_running_training(machine):
    root, answers, asked, started = machine

    async def steps(user):
        await user.open("/")
        await user.should_see("Adapt a network to your images")
        await user.should_see("Dataset901_Broken")
        await user.should_see("Licence of Dataset900_Donor")
        await user.should_see("Not for &lt;b&gt;commerce&lt;/b&gt;.")
        await user.open(f"/data?folder={root / 'images'}")
        await user.should_see("Found: <b>two</b> folders.")
        user.find("Adapt a network to these cases").click()
        await user.should_see("known")
        await user.should_see("Licence of the donor: CC-BY-NC 4.0.")
        await user.should_see("new: learned from your cases")
        user.find("Keep the donor's other labels, too: vessel.").click()
        user.find(kind=ui.button, content="Start").click()
        await user.should_see("stopped", retries=10)

    visit(root, steps=steps)
    (out,) = started
    assert out == root / "nnunet-dante" / "images"
    wanted = json.loads((out / "adapt.json").read_text())["asked"]
    assert wanted == {"model": "/models/D", "source": str(root / "images"), "budget_minutes": 60.0, "labels": [],
                      "baseline": False, "device": None, "overrides": {}, "keep_labels": ["all"]}


def test_a_full_disk_is_said_and_the_start_can_be_tried_again(machine, monkeypatch):
    root, answers, asked, started = machine

    def full(text, path):
        raise StorageError(f"{path} cannot be written (No space left on device).")

    async def steps(user):
        await user.open(f"/adapt?folder={root / 'images'}")
        await user.should_see("known")
        with monkeypatch.context() as disk:
            disk.setattr(runs, "write_text_atomically", full)
            user.find(kind=ui.button, content="Start").click()
            await user.should_see("No space left on device")
        assert not started
        user.find(kind=ui.button, content="Start").click()
        await user.should_see("stopped", retries=10)

    visit(root, steps=steps)
    assert len(started) == 1


def test_what_is_wrong_with_the_data_is_said_and_can_be_left_out(machine):
    root, answers, asked, started = machine
    bad = {**CASE, "name": "P02", "faults": ["P02.nii.gz was cut off"]}
    answers["look"] = {**SEEN, "problem": "1 of 2 cases cannot be used:\nP02: cut off", "cases": [CASE, bad]}

    async def steps(user):
        await user.open(f"/data?folder={root / 'images'}")
        await user.should_see("P02.nii.gz was cut off")
        await user.should_not_see("Adapt a network to these cases")
        answers["look"] = SEEN
        user.find("Leave these 1 cases out").click()
        await user.should_see("Adapt a network to these cases")

    visit(root, steps=steps)
    assert asked[-1] == ("look", str(root / "images"), {"without": ["P02"]})


def test_numbers_in_masks_are_named_by_hand(machine):
    root, answers, asked, started = machine
    answers["look"] = {**SEEN, "problem": "The masks hold their labels as whole numbers", "cases": [], "values": [1, 7]}

    async def steps(user):
        await user.open(f"/data?folder={root / 'images'}")
        await user.should_see("What do the numbers in the masks mean?")
        user.find("7 is").type("spleen")
        answers["look"] = SEEN
        user.find("Use these names").click()
        await user.should_see("Adapt a network to these cases")

    visit(root, steps=steps)
    assert asked[-1] == ("look", str(root / "images"), {"labels": ["background=1", "spleen=7"]})


@pytest.mark.parametrize("page", ["/data", "/adapt", "/run", "/result"])
@pytest.mark.parametrize("folder", ["/etc", "../..", "images/../../x"])
def test_folders_outside_are_refused(machine, page, folder):
    root = machine[0]

    async def steps(user):
        await user.open(f"{page}?folder={folder}")
        await user.should_see("lies outside of")

    visit(root, steps=steps)
    assert not machine[2], "nothing was read"


@pytest.mark.parametrize("path", ["/file", "/volume"])
def test_files_outside_are_not_sent(machine, path):
    root = machine[0]
    (root / "inside.txt").write_text("seen")
    (root / ".ssh").mkdir()
    (root / ".ssh" / "key").write_text("secret")
    (root / "link").symlink_to("/etc/hostname")

    async def steps(user):
        get = user.http_client.get
        for name in ("/etc/hostname", f"{root}/%2e%2e/%2e%2e/etc/hostname", f"{root}/link", f"{root}/.ssh/key", "//etc/hostname"):
            assert (await get(path + name)).status_code in (403, 404), name
        assert (await get(f"{path}{root}/nothing")).status_code == 404
        answer = await get(f"/file{root}/inside.txt")
        assert answer.text == "seen" and "sandbox" in answer.headers["content-security-policy"]
        assert "allow-scripts" not in answer.headers["content-security-policy"]

    visit(root, steps=steps)


def test_a_process_that_fails_is_no_spinner_for_ever(machine):
    root, answers, asked, started = machine
    answers["look"] = DanteError("the process ended without an answer")
    answers["donors"] = ValueError("a fault of ours")

    async def steps(user):
        await user.open(f"/data?folder={root / 'images'}")
        await user.should_see("ended without an answer")
        await user.open("/")
        await user.should_see("ValueError: a fault of ours")

    visit(root, steps=steps)


def test_a_run_is_followed_and_stopped(machine, monkeypatch):
    root, answers, asked, started = machine
    out = root / "somewhere" / "run"
    out.mkdir(parents=True)
    (out / "adapt.json").write_text(json.dumps({"format": 1, "asked": {"model": "/m/M", "source": "/s/S"}, "done": {}}))
    (out / "adapt.log").write_text("Error: the budget is too short\n")

    async def steps(user):
        await user.open("/runs")
        await user.should_see("M on S")
        await user.open(f"/run?folder={out}")
        await user.should_see("Error: the budget is too short")
        user.find("Go on").click()
        await asyncio.sleep(0.1)
        assert started == [out]
        with claimed(out):
            await asyncio.sleep(2.5)
            await user.should_see("Stop")
            await user.should_not_see("Delete")
        await asyncio.sleep(2.5)
        user.find("Delete").click()
        await user.should_see("Your images stay.")
        user.find("Delete it").click()
        await user.should_see("No run yet", retries=10)

    visit(root, steps=steps)
    assert not out.exists()


def test_another_process_answers_and_what_it_raises_arrives(monkeypatch):
    async def go():
        with pytest.raises(DanteError, match="no folder"):
            await ask.ask("send_to_dafne", "model.zip", "/nowhere")
        with pytest.raises(DanteError, match="no such function failed. KeyError"):
            await ask.ask("no such function")
        monkeypatch.setattr(ask, "_waiting", [])
        monkeypatch.setattr(ask.sys, "executable", "/bin/false")
        with pytest.raises(DanteError, match=r"ended without an answer \(exit code 1\)"):
            await ask.ask("findings")

    asyncio.run(go())


def finished(out, folds):
    """Write what the page of a result reads; return image, truth and the adapted network's mask."""
    raw, model = out / "nnUNet_raw" / "Dataset001_M", out / "nnUNet_results" / "Dataset001_M" / "nnUNetTrainerLoRA__P__3d_fullres"
    shown = [raw / "imagesTr" / "P01_0000.nii.gz", raw / "labelsTr" / "P01.nii.gz",
             model / f"fold_{folds[0] if folds else 'all'}" / "validation" / "P01.nii.gz"]
    for file in (*shown, model / "fold_all" / "validation" / "P01.nii.gz", out / "M.model"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (raw / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz", "labels": {"background": 0, "organ": 1}}))
    (out / "adapt.json").write_text(json.dumps({"format": 1, "asked": {"model": "M", "source": "S"}, "done": {
        "data": {"dataset": "Dataset001_M"}, "folds": {"folds": folds},
        "files": {"dafne": "M.model", "folder": str(model), "fold": "all", "commands": []}}}))
    return shown


@pytest.mark.parametrize("folds", [[], ["0", "1"]])
def test_the_adapted_network_s_masks_are_shown_also_when_no_case_was_left_unseen(machine, monkeypatch, folds):
    """With one patient there are no folds: the masks are those of the network that was trained on all cases."""
    shown = finished(machine[0] / "run", folds)

    async def strengths(*_):
        return [{"strength": 0.96, "curve": [[0, 0.5], [1, 0.7]] if folds else []}] * (len(folds) + 1)

    monkeypatch.setattr(result, "ask", strengths)

    async def steps(user):
        await user.open(f"/result?folder={machine[0] / 'run'}")
        await user.should_see("The result keeps 96 %")
        (viewer,) = user.find(Viewer).elements
        assert [volume["url"].removeprefix("/volume") for volume in viewer._props["volumes"]] == [str(file) for file in shown]
        await (user.should_not_see if folds else user.should_see)("No case was left unseen")
        await (user.should_see if folds else user.should_not_see)("The curve shows Dice")

    visit(machine[0], steps=steps)


def test_a_model_goes_into_the_folder_of_dafne_and_into_no_other(machine, monkeypatch):
    root, answers, asked, started = machine
    finished(root / "run", [])
    answers |= {"strengths": [{"strength": 1.0, "curve": []}], "send_to_dafne": "Wrote M_1.model"}
    monkeypatch.setattr(result, "ask", start.ask)
    monkeypatch.setenv("HOME", str(root))  # where Dafne has never been started

    async def steps(user):
        await user.open(f"/result?folder={root / 'run'}")
        user.find("Put it into Dafne").click()
        await user.should_see("File > Import model...")
        assert not any(name == "send_to_dafne" for name, *_ in asked)
        user.find("Models folder of Dafne").type(str(root / "images"))
        user.find("Put it into Dafne").click()
        await user.should_see("if it is open, start it again")
        (fold,) = (root / "run" / "nnUNet_results").glob("*/*/fold_all")
        assert asked[-1] == ("send_to_dafne", str(fold), str(root / "images"))

    visit(root, steps=steps)


def test_the_plan_for_one_patient_speaks_of_no_folds(machine):
    root, answers, asked, started = machine
    answers["look"] = {**SEEN, "cases": [CASE, {**CASE, "name": "P01b"}]}

    async def steps(user):
        await user.open(f"/adapt?folder={root / 'images'}")
        await user.should_see("2 cases, 1 patient.")
        await user.should_see("with one patient, no case can be left unseen")
        await user.should_not_see("folds")

    visit(root, steps=steps)


@pytest.mark.parametrize("done", [{"cost": {"mib": "x"}}, {"files": {}, "report": {"dice": [1]}}, {"files": {"commands": [3]}},
                                  {"folds": {"folds": 5}}, {"report": {"dice": {"donor": "x"}}}])
@pytest.mark.parametrize("page", ["/run", "/result"])
def test_a_damaged_record_is_no_blank_page(machine, page, done):
    out = machine[0] / "run"
    out.mkdir()
    (out / "adapt.json").write_text(json.dumps({"asked": {}, "done": done}))

    async def steps(user):
        await user.open(f"{page}?folder={out}")
        await user.should_see("cannot be" if page == "/result" and "files" in done else "Run" if page == "/run" else "no result yet")

    visit(machine[0], steps=steps)
