"All settings are in settings.ini; edit there, not here."
import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

class BuildOptional(build_ext):
    """Compile the selective scan with OpenMP, else without, else not at all: the package works
    without it (see pahcl.compiled_scan).
    """
    def build_extension(self, ext):
        for openmp in (['-fopenmp'], []):
            # never -ffast-math: linking with it changes the floating-point mode of the process
            ext.extra_compile_args = ['-O3', '-g0', '-ffp-contract=fast', *openmp]
            ext.extra_link_args = openmp
            try: return super().build_extension(ext)
            except Exception as e:
                print(f'pahcl: {ext.name} was not compiled{" with OpenMP" if openmp else ""} ({e})')
        print('pahcl: no C compiler that serves was found: the selective scan will run in PyTorch, '
              'more slowly.')

scan = setuptools.Extension(f"{cfg['lib_path']}._selective_scan",
                            [f"{cfg['lib_path']}/csrc/selective_scan.c"], optional=True)

setuptools.setup(
    name=cfg['lib_name'], version=cfg['version'],
    description=cfg['description'], keywords=cfg['keywords'], author=cfg['author'],
    author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
    packages=setuptools.find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_name']: ['configs/**/*.yaml', 'parameters/*', 'csrc/*.c']},
    ext_modules=[scan], cmdclass={'build_ext': BuildOptional},
    include_package_data=True, python_requires='>='+cfg['min_python'],
    install_requires=shlex.split(cfg.get('requirements', '')),
    extras_require={'dev': shlex.split(cfg.get('dev_requirements', '')),
                    'cuda': shlex.split(cfg.get('cuda_requirements', ''))},
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists()
    else '', long_description_content_type='text/markdown', zip_safe=False,
    entry_points={'console_scripts': cfg.get('console_scripts', '').split(),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]})
