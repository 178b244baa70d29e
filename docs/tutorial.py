# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # Tutorial: from a pretrained network to one of your own
#
# A hospital gives you a network that finds a liver in its images. Your scanner makes other images, and you want the
# lesion in the liver as well. You have three labelled cases. This tutorial goes the whole way on small made-up images:
# transfer, train, predict, compare, export. It takes two minutes on a CPU.
#
# Run it as a script (`python docs/tutorial.py`), or open it as a notebook with
# [jupytext](https://jupytext.readthedocs.io). Everything is written into the folder `nnunet-dante-tutorial`.

# %%
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np

ROOT = Path("nnunet-dante-tutorial").resolve()
shutil.rmtree(ROOT, ignore_errors=True)
for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):  # nnU-Net's three folders
    os.environ[name] = str(ROOT / name)
    (ROOT / name).mkdir(parents=True)
os.environ |= {"nnUNet_compile": "f", "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1",  # for a small machine
               "OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait take no time from those that work


def shell(command: str) -> str:
    """Run a command as you would in a terminal, and return what it prints."""
    words = shlex.split(command)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the programs beside this Python
    done = subprocess.run([shutil.which(words[0], path=path) or words[0], *words[1:]], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}")
    return done.stdout


# %% [markdown]
# ## Two data sets
#
# Dataset 901 is the hospital's: a bright organ in a grey body, and the organ is the only label. Dataset 902 is yours:
# the contrast is weaker, the noise is stronger, and a lesion is labelled too. Both are in
# [nnU-Net's raw format](https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md). Of your five
# cases, `case_3` and `case_4` are not used for training.

# %%
SHAPE = (32, 32, 24)  # voxels of 1 mm


def ball(centre, radius: float) -> np.ndarray:
    """Return the mask of a ball; centre and radius in voxels."""
    distances = np.indices(SHAPE) - np.reshape(centre, (3, 1, 1, 1))
    return (distances ** 2).sum(0) <= radius ** 2


def write_dataset(name: str, cases: int, labels: dict[str, int], organ: float, noise: float) -> None:
    """Write labelled cases: a body of intensity 1, an organ of intensity `organ`, a lesion of 0.6 in it, and noise."""
    rng = np.random.default_rng(0)
    folder = ROOT / "nnUNet_raw" / name
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for case in range(cases):
        centre = np.array([14, 15, 12]) + rng.integers(-2, 3, 3)
        liver, lesion = ball(centre, rng.uniform(7, 9)), ball(centre + rng.integers(-2, 3, 3), rng.uniform(2.5, 3.5))
        image = ball([16, 16, 12], 15) + (organ - 1) * liver + (0.6 - organ) * lesion + rng.normal(0, noise, SHAPE)
        mask = (liver * labels["liver"]).astype(np.uint8)
        if "lesion" in labels:
            mask[lesion] = labels["lesion"]
        for values, file in ((image.astype(np.float32), f"imagesTr/case_{case}_0000.nii.gz"),
                             (mask, f"labelsTr/case_{case}.nii.gz")):
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / file)
    (folder / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}))


write_dataset("Dataset901_Hospital", 8, {"background": 0, "liver": 1}, organ=2.0, noise=0.1)
write_dataset("Dataset902_Mine", 5, {"background": 0, "lesion": 1, "liver": 2}, organ=1.5, noise=0.3)

# %% [markdown]
# ## The hospital's network
#
# It is an ordinary nnU-Net. Usually you download one; here we train it, for one epoch. nnU-Net would plan a network of
# millions of weights, so the plans are changed to a small one.

# %%
shell("nnUNetv2_plan_and_preprocess -d 901 -c 3d_fullres -npfp 1 --no_pp")
file = ROOT / "nnUNet_preprocessed" / "Dataset901_Hospital" / "nnUNetPlans.json"
plans = json.loads(file.read_text())
plans["configurations"]["3d_fullres"] |= {"patch_size": [24, 24, 24], "batch_size": 2}
plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {
    "n_stages": 3, "features_per_stage": [8, 16, 32], "n_conv_per_stage": [1, 1, 1], "n_conv_per_stage_decoder": [1, 1],
    "strides": [[1] * 3, [2] * 3, [2] * 3], "kernel_sizes": [[3] * 3] * 3}
file.write_text(json.dumps(plans))
os.environ["nnUNet_n_proc_DA"] = "0"  # so small a training augments faster in its own process
shell("nnUNetv2_preprocess -d 901 -c 3d_fullres -np 1")
shell("nnUNetv2_train 901 3d_fullres all -tr nnUNetTrainer_1epoch -device cpu")
DONOR = ROOT / "nnUNet_results/Dataset901_Hospital/nnUNetTrainer_1epoch__nnUNetPlans__3d_fullres"

# %% [markdown]
# ## Transfer
#
# `transfer` makes this network the start of a training on your data. Read its report: labels and channels are matched
# by name, so "liver" keeps what the network knows, although its number is another one in your data set. "lesion" is
# new.
#
# The numbers of epochs and steps are small here. Leave them out on real data: the default is 100 epochs of 250 steps.

# %%
(ROOT / "nnUNet_preprocessed/Dataset902_Mine").mkdir()
(ROOT / "nnUNet_preprocessed/Dataset902_Mine/splits_final.json").write_text(json.dumps(
    [{"train": ["case_0", "case_1", "case_2"], "val": ["case_3", "case_4"]}]))
said = shell(f"nnunet-dante transfer {DONOR} -d 902 --fold all --preprocess"
             " --epochs 8 --iterations 15 --val-iterations 4 --lr 0.01")
print(said[said.index("Transfer to"):])  # before it stands what nnU-Net says while it prepares the images

# %% [markdown]
# ## Train
#
# `nnunet-dante train` is `nnUNetv2_train`, with the trainers of this package found. The log says first how good the
# network is before any training, and which weights are trained.

# %%
log = shell("nnunet-dante train 902 3d_fullres 0 -p nnUNetDantePlans -tr nnUNetTrainerLoRA -device cpu")
print(*[line for line in log.splitlines() if "seudo dice" in line], sep="\n")

# %% [markdown]
# ## Predict, with stock nnU-Net
#
# The trained network is a stock nnU-Net network: `nnUNetv2_predict` needs no option of ours, and this package need not
# be installed. For comparison, the hospital's network predicts the same case as it is.

# %%
RAW, FOLDS = ROOT / "nnUNet_raw" / "Dataset902_Mine", ROOT / "nnUNet_results/Dataset902_Mine"
(ROOT / "input").mkdir()
shutil.copy(RAW / "imagesTr" / "case_3_0000.nii.gz", ROOT / "input")
shell("nnUNetv2_predict -i input -o adapted -d 902 -c 3d_fullres -f 0 -p nnUNetDantePlans -tr nnUNetTrainerLoRA"
      " -device cpu -npp 0 -nps 0")
shell("nnUNetv2_predict -i input -o before -d 901 -c 3d_fullres -f all -tr nnUNetTrainer_1epoch"
      " -device cpu -npp 0 -nps 0")


def read(file: Path) -> np.ndarray:
    """Return the middle slice of a case."""
    return np.asarray(nibabel.load(file).dataobj)[:, :, SHAPE[2] // 2].T


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return the overlap of two masks: 1 is perfect."""
    return 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())


truth = read(RAW / "labelsTr" / "case_3.nii.gz")
before, adapted = (read(ROOT / folder / "case_3.nii.gz") for folder in ("before", "adapted"))
for label, number, known in (("liver", 2, before == 1), ("lesion", 1, None)):
    untrained = "does not know it" if known is None else f"{dice(known, truth == number):.2f}"
    print(f"{label}: hospital's network {untrained}, adapted {dice(adapted == number, truth == number):.2f}")

# %% [markdown]
# One slice of a case that the training did not use. Liver in blue, lesion in orange:

# %%
figure, axes = plt.subplots(1, 4, figsize=(9, 2.6))
masks = {"your image": None, "hospital's network": np.where(before == 1, 2, 0), "adapted, 3 cases": adapted,
         "your mask": truth}
for axis, (title, mask) in zip(axes, masks.items()):
    axis.imshow(read(ROOT / "input" / "case_3_0000.nii.gz"), cmap="gray")
    if mask is not None:
        axis.imshow(np.ma.masked_equal(mask, 0), cmap="coolwarm_r", vmin=0.5, vmax=2.5, alpha=0.6)
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()
figure.tight_layout()
figure.savefig(ROOT / "tutorial.png", dpi=80)

# %% [markdown]
# ![Image, the hospital's network, the adapted network, and the true mask](images/tutorial.png)
#
# ## Hand it on
#
# `adapter.safetensors` in the fold's folder holds only what was trained. Whoever has the hospital's network can rebuild
# yours with it. For [Dafne](https://dafne.network), export a `.model` file.

# %%
fold = FOLDS / "nnUNetTrainerLoRA__nnUNetDantePlans__3d_fullres" / "fold_0"
print(shell(f"nnunet-dante adapter info {fold / 'adapter.safetensors'}"))
print(shell(f"nnunet-dante export {fold.parent} -o Liver.model"))

# %% [markdown]
# ## On your own data
#
# The same commands work on real data. [Fine-tune a pretrained network](fine-tune.md) explains every option,
# [Choose a method](choosing.md) the other trainers, and [Compare methods](compare.md) how to measure which one is the
# best for you. Look at the donor's score before training: a network that is good already gains little from three cases.
