// One NiiVue canvas. The first volume is the image, the others are masks with the colours of the labels.
export default {
  template: `<div class="viewer"><canvas ref="canvas" tabindex="0" role="img" :aria-label="label"></canvas></div>`,
  props: { volumes: Array, colours: Object, label: String },
  data: () => ({ opacities: {}, shown: "" }),
  async mounted() {
    const module = await import("/niivue.js");
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
    async load() {
      const wanted = JSON.stringify(this.volumes ?? []);
      if (!this.nv || wanted === this.shown || !this.volumes?.length) return;
      this.shown = wanted;
      try {
        await this.nv.loadVolumes(this.volumes.map((v, i) => ({ url: v.url, name: v.file,
          colormap: i ? "red" : "gray", opacity: i ? this.opacities[v.name] ?? 0 : 1 })));
      } catch (error) {
        this.$emit("failed", String(error));
        return;
      }
      this.nv.volumes.slice(1).forEach((mask) => mask.setColormapLabel(this.colours));
      this.nv.updateGLVolume();
      const image = this.nv.volumes[0];
      this.range = [image.cal_min, image.cal_max];
      this.$emit("shown", wanted);
      this.$refs.canvas.dataset.shown = this.nv.volumes.length;
    },
    opacity(name, value) {
      this.opacities[name] = value;
      const index = (this.volumes ?? []).findIndex((v) => v.name === name);
      if (this.nv?.volumes[index]) this.nv.setOpacity(index, value);
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
