// Browsers start no worker from file://. There, a hidden frame does a worker's work, so that the
// search of the site opens from a folder; elsewhere this file does nothing.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      const inside = this.inside, scripts = []
      inside.postMessage = data => {           // from the worker to the page
        const event = new MessageEvent("message", {data})
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      const load = source => new Promise((done, failed) => {
        const script = inside.document.createElement("script")
        Object.assign(script, {src: source, onload: done, onerror: failed})
        inside.document.body.append(script)
      })
      inside.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve())
      this.ready = load(url)
      this.terminate = () => frame.remove()
    }
    postMessage(data) {                        // from the page to the worker
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})))
    }
  }
