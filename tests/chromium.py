"A headless Chromium, driven by its DevTools protocol, to look at pages as a reader does"
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'


def find_chromium():
    "Its path, or None."
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    "One tab; `errors` holds what its console complained of."
    def __init__(self, address):
        from websocket import create_connection
        self.socket, self.count, self.errors = create_connection(
            address, timeout=60, suppress_origin=True), 0, []
        for domain in ('Page', 'Runtime', 'Log'): self.send(f'{domain}.enable')
        self.send('Emulation.setFocusEmulationEnabled', enabled=True)
        # light or dark is chosen anew for each page
        self.send('Page.addScriptToEvaluateOnNewDocument',
                  source="try { localStorage.clear() } catch {}")

    def send(self, method, **parameters):
        "Send a command; its result."
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=parameters)))
        return self.receive(lambda m: m.get('id') == self.count).get('result', {})

    def receive(self, wanted):
        "Read messages, remember errors, until one is wanted."
        while True:
            m = json.loads(self.socket.recv())
            kind, what = m.get('method'), m.get('params', {})
            if kind == 'Runtime.exceptionThrown': self.errors.append(str(what['exceptionDetails']))
            if kind == 'Log.entryAdded' and what['entry']['level'] == 'error':
                self.errors.append(what['entry']['text']+' '+what['entry'].get('url', ''))
            if kind == 'Runtime.consoleAPICalled' and what['type'] == 'error':
                self.errors.append(str(what['args']))
            if wanted(m): return m

    def resize(self, width):
        "Give the window another width."
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=900,
                  deviceScaleFactor=1, mobile=False)

    def open(self, address, width=1200, dark=False):
        "Open a page in a window of this width."
        self.resize(width)
        self.send('Emulation.setEmulatedMedia', features=[
            dict(name='prefers-color-scheme', value='dark' if dark else 'light')])
        # from nowhere: an address that differs in its anchor alone would load nothing
        for place in ('about:blank', str(address)):
            self.send('Page.navigate', url=place)
            self.receive(lambda m: m.get('method') == 'Page.loadEventFired')

    def search(self, words) -> list:
        "Addresses of the pages that the search finds, best first."
        self.run("document.querySelector('#__search').checked ||"
                 "document.querySelector('.md-header label[for=__search]').click()")
        self.wait_for("(field => { field.focus(); return field === document.activeElement })"
                      "(document.querySelector('.md-search__input'))")
        self.send('Input.insertText', text=words)
        self.send('Input.dispatchKeyEvent', type='keyUp', key=words[-1])
        self.wait_for("!!document.querySelector('.md-search-result__item a')")
        self.run('new Promise(done => setTimeout(done, 500))')   # until it is complete
        return self.run("[...document.querySelectorAll('.md-search-result__item > a')]"
                        ".map(a => a.href.split(/[?#]/)[0])")

    def run(self, program):
        "The value of some JavaScript."
        done = self.send('Runtime.evaluate', expression=program, returnByValue=True,
                         awaitPromise=True)
        assert 'exceptionDetails' not in done, done['exceptionDetails']
        return done['result'].get('value')

    def wait_for(self, program, seconds=30):
        "The value of some JavaScript as soon as there is one."
        end = time.monotonic()+seconds
        while time.monotonic() < end:
            if value := self.run(program): return value
            time.sleep(.1)
        raise TimeoutError(program)


@contextmanager
def open_browser():
    "A browser for a block."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [find_chromium(), '--headless=new', '--no-sandbox', '--disable-gpu',
             '--disable-dev-shm-usage', '--remote-debugging-port=0', '--no-first-run',
             f'--user-data-dir={folder}', 'about:blank'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port, end = Path(folder)/'DevToolsActivePort', time.monotonic()+60
            while not (port.exists() and port.read_text().strip()):
                assert time.monotonic() < end and process.poll() is None, 'Chromium does not start'
                time.sleep(.1)
            number = port.read_text().split()[0]
            with urllib.request.urlopen(f'http://127.0.0.1:{number}/json') as answer:
                tab = next(t for t in json.load(answer) if t['type'] == 'page')
            yield Browser(tab['webSocketDebuggerUrl'])
        finally:
            process.terminate()
            process.wait(20)
