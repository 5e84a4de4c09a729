"Build metadata: everything is read from settings.ini, which is the one place to edit."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

evaluation = cfg["eval_requirements"].split()
serving = cfg["serve_requirements"].split()
gguf = cfg["gguf_requirements"].split()
adapters = cfg["adapters_requirements"].split()
development = cfg["dev_requirements"].split()
status = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}[cfg["status"]]
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Source": cfg["git_url"]},
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {status}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "eval": evaluation,
        "gguf": gguf,
        "serve": serving,
        "adapters": adapters,
        "dev": evaluation + gguf + serving + adapters + development,
    },
    packages=find_packages(include=["linearpatch", "linearpatch.*"]),
    package_data={
        "linearpatch": [
            "playground/*",
            "passages/**/*",
            "tasks/*",
            "recipes/*",
            "templates/*",
            "shipped/*",
            "py.typed",
        ]
    },
    include_package_data=False,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": ["linearpatch=linearpatch._modidx:d"],
    },
    zip_safe=False,
)
