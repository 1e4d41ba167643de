"All settings are in settings.ini; edit there, not here."
import os
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

# of the C file, as `pahcl.compiled_scan` calls them
FUNCTIONS = 'size levels forked openmp forward backward list'.split()

class BuildOptional(build_ext):
    """Compile the selective scan with OpenMP, else without, else not at all: the package works
    without it (see pahcl.compiled_scan).
    """
    def finalize_options(self):
        "Prefer gcc on Windows: Microsoft's compiler does not know the vectors of the C file."
        super().finalize_options()
        if os.name == 'nt' and not self.compiler and shutil.which('gcc'): self.compiler = 'mingw32'

    def get_export_symbols(self, ext):
        "The scan is called by ctypes: no Python module, so no PyInit."
        return ext.export_symbols

    def build_extension(self, ext):
        for openmp in (['-fopenmp'], []):
            # never -ffast-math: linking with it changes the floating-point mode of the process
            ext.extra_compile_args = ['-O3', '-g0', '-ffp-contract=fast', *openmp]
            gcc = self.compiler.compiler_type == 'mingw32'   # its libraries come along
            ext.extra_link_args = [*openmp, *(['-static'] if gcc else [])]
            try: return super().build_extension(ext)
            except Exception as e:
                print(f'pahcl: {ext.name} was not compiled{" with OpenMP" if openmp else ""} ({e})')
        print('pahcl: no C compiler that serves was found: the selective scan will run in PyTorch, '
              'more slowly.')

scan = setuptools.Extension(
    f"{cfg['lib_path']}._selective_scan", [f"{cfg['lib_path']}/csrc/selective_scan.c"],
    export_symbols=[f'pahcl_{name}' for name in FUNCTIONS], optional=True)

setuptools.setup(
    name=cfg['lib_name'], version=cfg['version'],
    description=cfg['description'], keywords=cfg['keywords'], author=cfg['author'],
    author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
    packages=setuptools.find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_name']: ['configs/**/*.yaml', 'protocols/*.yaml', 'parameters/*',
                                    'weights/*', 'examples/*', 'csrc/*.c']},
    ext_modules=[scan], cmdclass={'build_ext': BuildOptional},
    include_package_data=True, python_requires='>='+cfg['min_python'],
    install_requires=shlex.split(cfg.get('requirements', '')),
    extras_require={name: shlex.split(cfg.get(f'{name}_requirements', ''))
                    for name in ('dev', 'cuda', 'cluster')},
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists()
    else '', long_description_content_type='text/markdown', zip_safe=False,
    entry_points={'console_scripts': cfg.get('console_scripts', '').split(),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]})
