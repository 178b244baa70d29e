// One NiiVue canvas. The first volume is the image, the others are masks with the colours of the labels. A mask is
// fetched when it is first to be seen.
export default {
  template: `<div class="viewer"><canvas ref="canvas" tabindex="0" role="img" :aria-label="label"></canvas></div>`,
  props: { volumes: Array, colours: Object, label: String },
  created() {
    Object.assign(this, { opacities: {}, masks: {}, names: [], key: "" }); // not reactive: NiiVue's objects are large
  },
  async mounted() {
    const module = window.niivue ?? await import("/niivue.js"); // a report has loaded it
    this.kinds = module.SLICE_TYPE;
    const light = document.body.classList.contains("body--dark") ? 0.1 : 0;
    this.nv = new module.Niivue({ backColor: [light, light, light, 1], show3Dcrosshair: true, isColorbar: false,
      loadingText: "", dragAndDropEnabled: false, crosshairWidthUnit: "percent", crosshairWidth: 0.3,
      multiplanarShowRender: module.SHOW_RENDER.ALWAYS });
    this.nv.onLocationChange = (at) => this.$emit("location", at.string);
    await this.nv.attachToCanvas(this.$refs.canvas);
    this.nv.setInterpolation(true);
    await this.load();
  },
  beforeUnmount() {
    this.nv?.gl?.getExtension("WEBGL_lose_context")?.loseContext();
  },
  watch: {
    volumes() { this.load(); },
  },
  methods: {
    source(volume) {
      return { url: volume.url, name: volume.file, colormap: volume.name === "image" ? "gray" : "red",
        opacity: volume.name === "image" ? 1 : this.opacities[volume.name] ?? 0 };
    },
    async load() {
      const key = JSON.stringify(this.volumes ?? []);
      if (!this.nv || key === this.key || !this.volumes?.length) return;
      this.key = key;
      this.names = ["image"];
      try {
        await this.nv.loadVolumes([this.source(this.volumes[0])]);
        for (const volume of this.volumes.slice(1)) await this.see(volume);
      } catch (error) {
        this.$emit("failed", String(error));
      }
    },
    async see(volume) {
      if (!this.opacities[volume.name] || this.names.includes(volume.name)) return;
      const key = this.key;
      this.names.push(volume.name);
      const mask = await this.nv.addVolumeFromUrl(this.source(volume));
      if (key !== this.key) return this.nv.removeVolume(mask); // another case was chosen in between
      mask.setColormapLabel(this.colours);
      this.masks[volume.name] = mask;
      this.opacity(volume.name, this.opacities[volume.name]);
      this.nv.updateGLVolume();
      this.$refs.canvas.dataset.shown = this.nv.volumes.length;
    },
    opacity(name, value) {
      this.opacities[name] = value;
      const volume = (this.volumes ?? []).find((v) => v.name === name);
      if (!this.nv || !volume) return;
      const index = this.nv.volumes.indexOf(this.masks[name]);
      if (index > 0) this.nv.setOpacity(index, value);
      else if (this.key) this.see(volume).catch((error) => this.$emit("failed", String(error)));
    },
    arrange(how) {
      this.nv?.setSliceType(this.kinds[how.toUpperCase()]);
    },
    outlines(width) {
      if (!this.nv) return;
      this.nv.overlayOutlineWidth = width;
      this.nv.updateGLVolume();
    },
    window(low, high) {
      const image = this.nv?.volumes[0];
      if (!image) return;
      image.cal_min = image.global_min + low * (image.global_max - image.global_min);
      image.cal_max = image.global_min + high * (image.global_max - image.global_min);
      this.nv.updateGLVolume();
    },
  },
};
