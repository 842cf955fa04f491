"""The package av_mae. Tested versions of everything, direct or not, are in launch/requirements.lock."""

import pathlib
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

REQUIRES = [
    "jax>=0.10.2,<0.12",  # 0.10.2 is the oldest one tested (Python 3.11), 0.11 the newest (Python 3.12 and later)
    "flax>=0.12.8,<0.13",  # NNX: nnx.List and nnx.Param as used here; minor versions of flax still rename
    "optax>=0.2.8,<0.3",  # schedules and AdamW with a decay mask
    "orbax-checkpoint>=0.12.8,<0.13",  # its CheckpointManager API changes between minor versions
    "tensorstore>=0.1.76",  # orbax brings it; reads an array of the first checkpoint back
    "grain>=0.2.18,<0.3",  # MapDataset.mix, random_map and mp_prefetch; still 0.x
    "numpy>=2.1,<3",  # 2.1 is the first that jax 0.10 accepts on every Python here
    "ml_dtypes>=0.5,<0.7",  # bfloat16 in NumPy, for weight files; jax brings it
    "absl-py>=2.1,<3",  # flags that Grain's workers read
    "jaxtyping>=0.3.11,<0.4",  # shapes in signatures; still 0.x
    "einops>=0.8,<0.9",  # einsum and rearrange with named axes; still 0.x
    "ml_collections>=1.1,<2",  # locked ConfigDicts; 1.0 lacks wheels for Python 3.13
    "tensorflow-datasets>=4.9.10,<5",  # 4.9.10 builds and reads ArrayRecord without TensorFlow
    "array_record>=0.8.3,<0.9",  # first with wheels for Python 3.11 to 3.13; format readers are still 0.x
    "av>=17,<19",  # PyAV: 17 is the first whose reformat takes threads; bundles FFmpeg
    "simplejpeg>=1.9,<2",  # libjpeg-turbo; 1.9 has wheels for Python 3.13 and numpy 2
    "soundfile>=0.13,<0.15",  # FLAC from and to memory; 0.13 bundles libsndfile for all platforms here
    "soxr>=1.0,<2",  # resampling; 1.0 works with numpy 2
    "scipy>=1.15,<2",  # filters and transforms of sounds and baselines; jax needs it anyway
    "safetensors>=0.5,<0.9",  # published weights; 0.x without a promise of stability
    "tensorboardX>=2.6.4,<3",  # event files without TensorFlow; 2.6.4 accepts protobuf 6 and later
    "tqdm>=4.66,<5",  # progress bars
    "pyarrow>=20,<28",  # embeddings and lists as Parquet; float16 columns and metadata added to an open file
    "flatbuffers>=25,<26",  # jax.export writes with it and does not bring it
    "mir_eval>=0.8,<0.9",  # BSS Eval as published; 0.9 is to drop its module of separation
    "matplotlib>=3.10,<4",  # figures through Figure and FigureCanvasAgg
    "pillow>=11,<14",  # PNG files
    "fsspec>=2025.3",  # folders on stores (gs://, s3://); calendar versions
]
DOCS = [
    "mkdocs>=1.6.1,<2",  # the documentation; 2 is to be another program
    "mkdocs-material>=9.6,<10",  # its theme
    "mkdocstrings-python>=2.0,<3",  # the reference from docstrings, without importing the code
]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.12"],  # adds libtpu; Linux on TPU hosts only
    "cuda": ["jax[cuda13]>=0.10.2,<0.12"],  # CUDA 13 libraries as wheels; the driver is the machine's
    "prepare": [
        "apache-beam>=2.70,<3",  # preparing large sets on Beam runners; one machine needs none
        "gcsfs>=2025.3",  # gs://; calendar versions, those of fsspec
        "s3fs>=2025.3",  # s3://, likewise
    ],
    # Engines of prepare, one each; the version is the cluster's, so the ranges are wide. Tested: docs/data.md.
    "ray": ["ray[client]>=2.40,<3"],  # [client] for ray:// addresses; 3 may break its API
    "dask": ["distributed>=2025.3"],  # calendar versions
    "spark": ["pyspark>=4.0,<5"],  # 4 is the first for Python 3.12 and later; brings Spark, not Java
    "stores": [
        "gcsfs>=2025.3",  # work directories, checkpoints and exports on gs://; calendar versions, those of fsspec
        "s3fs>=2025.3",  # exports and sources of sets on s3://, likewise
    ],
    "test": [
        "gcsfs>=2025.3",  # as for stores
        "s3fs>=2025.3",  # likewise
        "gcp-storage-emulator>=2026.7",  # the server of gs:// in tests; the first release that answers today's gcsfs
        "beartype>=0.23,<0.24",  # checks jaxtyping's shapes at run time; 0.x, its checks change
        "ruff>=0.17.6,<0.18",  # lint and format: other minor versions format differently
        "mypy>=2.4,<3",  # types
        "duckdb>=1.2,<3",  # reads exported embeddings as users do
        "pandas>=2.3,<4",  # likewise
        "pytest>=8.4,<10",  # 8.4 is the first that fails on tests that return values
        "pytest-xdist>=3.6,<4",  # two test files at a time: compilation uses one core
        "PyYAML>=6,<7",  # reads the JobSet that a launcher writes; ml_collections brings it
        "scikit-learn>=1.6,<2",  # an independent reference for metrics; 1.6 is the first tested with numpy 2
        "playwright>=1.50,<2",  # drives the system's Chromium on a run's page; brings no browser itself
        "papermill>=2.6,<3",  # runs the notebooks
        "ipykernel>=6.29,<8",  # what papermill starts
        *DOCS,  # a test builds the documentation
    ],
    "colab": ["ipywidgets>=8,<9"],  # progress bars in notebooks
    "docs": DOCS,
}


class BuildWithRecipes(build_py):
    """Adds the recipes of configs/ to the package, as av_mae/configs/, in wheels. Editable installs read configs/."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib, "av_mae", "configs")
            shutil.copytree("configs", target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setup(
    name="av_mae",
    version="0.1.0",
    description="Audio-visual masked autoencoders with early fusion, in JAX/Flax",
    license="Apache-2.0",
    packages=find_packages(include=["av_mae", "av_mae.*"]),
    package_data={"av_mae": ["py.typed", "assets/*"]},
    cmdclass={"build_py": BuildWithRecipes},
    entry_points={"console_scripts": ["av_mae = av_mae.__main__:main"]},
    python_requires=">=3.11",  # nested f-strings aside, the oldest Python that jax 0.10 supports
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
