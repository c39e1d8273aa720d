"Everything it says comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf8')
cfg = ini['DEFAULT']
readme = here/'README.md'

class WithNotebooks(build_py):
    "The stages are notebooks: an installed package holds them, and the data files beside them, in carnb/nbs"
    def notebooks(self): return [p for p in sorted((here/cfg['nbs_path']).iterdir()) if p.is_file() and p.name[0] not in '._']
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return # then they are where they are edited
        target = Path(self.build_lib)/cfg['lib_path']/'nbs'
        target.mkdir(parents=True, exist_ok=True)
        for p in self.notebooks(): shutil.copyfile(p, target/p.name)
    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + [str(Path(self.build_lib)/cfg['lib_path']/'nbs'/p.name) for p in self.notebooks()]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]), python_requires=f">={cfg['min_python']}",
    package_data={'': ['*.yaml', '*.json', '*.npz', '*.safetensors']}, cmdclass={'build_py': WithNotebooks},
    install_requires=cfg['requirements'].split(),
    extras_require={name: cfg[f'{name}_requirements'].split() for name in ('dev', 'cluster')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    long_description=readme.read_text(encoding='utf8') if readme.exists() else '', long_description_content_type='text/markdown',
    zip_safe=False,
)
